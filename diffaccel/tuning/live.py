"""A live table of a tuning: what is being tried, and the frontier so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

import rich.live
from rich.console import Console, Group
from rich.text import Text

from diffaccel.tuning.budget import Budget
from diffaccel.tuning.result import as_table, table

if TYPE_CHECKING:
    from diffaccel.tuning.search import Search


class Live:
    """On stderr, for as long as the block lasts; nothing where it is not ``visible`` or nobody looks at a terminal."""

    def __init__(self, budget: Budget, minutes: float | None, *, visible: bool) -> None:
        console = Console(stderr=True)
        self._budget, self._minutes = budget, minutes
        self._live = rich.live.Live(console=console, transient=True) if visible and console.is_terminal else None
        self._started = time.perf_counter()
        self._what = "starting"
        self._rows: list[list[str]] = []
        self._alone = 0

    def __enter__(self) -> Live:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def doing(self, what: str) -> None:
        """Say what is being tried now."""
        self._what = what
        self._draw()

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Out of the way for as long as something else draws, with ``what`` as a line of its own."""
        if not self._live:
            yield
            return
        self._live.stop()
        self._live.console.print(Text(what, style="dim"))
        try:
            yield
        finally:
            self._live.start()

    def show(self, search: Search, seconds: float) -> None:
        """Show what is known by now."""
        self._rows, self._alone = table(search.frontier(), search.best), len(search.alone)
        self._draw()

    def _draw(self) -> None:
        if not self._live:
            return
        spent = (time.perf_counter() - self._started) / 60
        limit = f" of {self._minutes:g}" if self._minutes else ""
        head = Text(f"tuning for {self._budget}: {spent:.1f}{limit} min, {self._alone} settings by themselves")
        self._live.update(Group(head, Text(f"now: {self._what}", style="dim"), as_table(self._rows)))
