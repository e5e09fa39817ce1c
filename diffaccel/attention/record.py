"""What sparse attention did on one denoiser, and its report."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffaccel.attention.learned import Learned, Timing
from diffaccel.attention.section import BlockSparse
from diffaccel.denoiser import Site
from diffaccel.report import TechniqueReport

SPARSE = "sparse"
"""The key of `Record.calls` that counts sparse calls; every other key is the reason why calls stayed dense."""


@dataclass
class Record:
    """Figures of one denoiser.

    Args:
        planned: number of its sites.
        calls: attention calls that ran sparse, and dense by reason.
        backends: attention backends that were overridden.
        reached: sites that made any attention call.
    """

    planned: int
    calls: Counter[str] = field(default_factory=Counter)
    backends: set[str] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)
    layouts: dict[str, str] = field(default_factory=dict)
    achieved: dict[float, set[float]] = field(default_factory=dict)
    paths: set[str] = field(default_factory=set)
    slower: Timing | None = None
    notes: dict[str, None] = field(default_factory=dict)

    def learned(self, shape: Learned) -> None:
        """A shape of calls was met for the first time. Warns, once, where sparse is slower than dense."""
        self.reached |= set(shape.suitable) | set(shape.dense)
        self.paths |= shape.paths
        for tokens, layout in shape.layouts.items():
            if layout is not None and any(tokens in calls for calls in shape.suitable.values()):
                self.layouts[str(layout)] = layout.note
        slow = next((timing for timing in shape.timings if timing.slower), None)
        if slow is not None and self.slower is None:
            self.slower = slow
            warnings.warn(f"diffaccel: {_slower(slow)}", stacklevel=2)

    def saw(self, shape: Learned) -> None:
        """The patterns of ``shape`` were put to use."""
        for asked in shape.asked():
            self.achieved.setdefault(asked, set()).update(round(got, 3) for got in shape.achieved(asked))
        self.notes.update(shape.maker.notes)


class AttachedAttention:
    """Sparse attention at work."""

    def __init__(
        self, sections: Sequence[BlockSparse], records: Sequence[tuple[Sequence[Site], Record]], notes: Sequence[str]
    ) -> None:
        self._sections = sections
        self._records = records
        self._notes = notes

    def report(self) -> TechniqueReport:
        calls = sum((record.calls for _, record in self._records), Counter())
        sparse = calls.pop(SPARSE, 0)
        records = [record for _, record in self._records]
        facts = {
            "calls_sparse": sparse,
            "calls_dense": dict(calls),
            "density": {
                f"{asked:g}": sorted(set().union(*(r.achieved.get(asked, ()) for r in records)))
                for asked in sorted({section.density for section in self._sections})
            },
            "path": sorted(set().union(*(r.paths for r in records))),
            "layouts": sorted(set().union(*(r.layouts for r in records))),
        }
        return TechniqueReport(
            technique="attention",
            settings="; ".join(_settings(section) for section in self._sections),
            sites=sum(record.planned for record in records),
            facts=facts,
            notes=self._report_notes(),
        )

    def _report_notes(self) -> list[str]:
        notes = list(self._notes)
        for sites, record in self._records:
            silent = [site.full_name for i, site in enumerate(sites) if i not in record.reached]
            if record.reached and silent:
                names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
                notes.append(f"planned, but never called: {names}")
            if record.backends:
                notes.append(
                    f"attention backend {', '.join(sorted(record.backends))} is set aside at the planned sites"
                )
            notes += [f"{layout}: {note}" for layout, note in sorted(record.layouts.items()) if note]
            notes += record.notes
            if record.slower is not None:
                notes.append(_slower(record.slower))
        return notes

    def bake(self) -> None:
        """Nothing to free: no weight was changed."""


def _settings(section: BlockSparse) -> str:
    return f"density {section.density:g} at {section.sites!r}, progress {section.steps[0]:g} to {section.steps[1]:g}"


def _slower(timing: Timing) -> str:
    return (
        f"sparse attention is slower than dense here: {timing.sparse * 1e3:.2f} ms instead of {timing.dense * 1e3:.2f} "
        f"ms for a call of shape {list(timing.shape)}; applied as asked. Lower density or longer sequences make it pay"
    )
