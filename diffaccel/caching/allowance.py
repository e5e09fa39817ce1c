"""How many bytes caches may keep, all denoisers of a pipeline together."""

from __future__ import annotations

from collections.abc import Callable, Hashable

Allow = Callable[[Hashable, int], bool]
"""Whether so many bytes may be kept for something that has this name in its call; asked before they are spent."""


class Allowance:
    """Grants memory, first come first served.

    Args:
        limit: in bytes; None: there is none.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._granted: dict[Hashable, int] = {}
        self._refused: dict[Hashable, int] = {}

    @property
    def taken(self) -> int:
        """Bytes granted."""
        return sum(self._granted.values())

    @property
    def refused(self) -> int:
        """Bytes asked for and not granted."""
        return sum(self._refused.values())

    def take(self, owner: object, branch: str, name: Hashable, nbytes: int) -> bool:
        """Whether ``owner`` may keep so many bytes for ``name``. The first answer holds until `give_back`."""
        key = (id(owner), branch, name)
        if key not in self._granted and key not in self._refused:
            fits = self.limit is None or self.taken + nbytes <= self.limit
            (self._granted if fits else self._refused)[key] = nbytes
        return key in self._granted

    def give_back(self, owner: object, branch: str | None = None) -> None:
        """``owner`` keeps nothing any more, of one branch or of all."""
        for known in (self._granted, self._refused):
            for key in [k for k in known if k[0] == id(owner) and branch in (None, k[1])]:  # type: ignore[index]
                del known[key]
