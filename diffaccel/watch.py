"""Being told when a method of one object was called, without a trace left behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def watch_method(owner: Any, name: str, then: Callable[[Any], None]) -> Callable[[], None]:
    """Call ``then(owner)`` after each call of ``owner``'s method ``name``, on this instance only.

    Several may watch one method and leave in any order.

    Returns:
        The undo. When the last watcher has left, the instance is as it was.
    """
    watched = owner.__dict__.get(name)
    if not isinstance(watched, _Watched):
        watched = _Watched(owner, name)
        setattr(owner, name, watched)
    watched.watchers.append(then)

    def leave() -> None:
        watched.watchers.remove(then)
        if not watched.watchers:
            watched.restore()

    return leave


class _Watched:
    """Stands for a method on one instance. A deep copy of the owner gets its own plain method back."""

    def __init__(self, owner: Any, name: str) -> None:
        self.watchers: list[Callable[[Any], None]] = []
        self._owner, self._name = owner, name
        self._had = owner.__dict__.get(name)
        self._method = getattr(owner, name)
        functools.update_wrapper(self, self._method)  # pipelines inspect the signature for `sigmas`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._method(*args, **kwargs)
        for then in tuple(self.watchers):
            then(self._owner)
        return result

    def restore(self) -> None:
        if self._had is None:
            self._owner.__dict__.pop(self._name, None)
        else:
            setattr(self._owner, self._name, self._had)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self._owner), self._owner)
        return functools.partial(getattr(type(copied), self._name), copied)

    def __reduce__(self) -> Any:
        return getattr, (self._owner, self._name)
