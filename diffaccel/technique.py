"""What every technique offers, so that `accelerate` can treat them alike.

A technique's folder has ``section.py`` (torch-free settings) and ``attach.py`` with two functions: ``resolve`` checks
the sections against the model and changes nothing; ``attach`` does the work and registers how to undo it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from diffaccel.clock import Clock
from diffaccel.denoiser import Denoiser
from diffaccel.hooks import install
from diffaccel.plan import Artefacts
from diffaccel.report import TechniqueReport
from diffaccel.root import RootHook


class Attached(Protocol):
    """A technique at work."""

    def report(self) -> TechniqueReport:
        """What it did so far."""

    def bake(self) -> None:
        """Let go of everything that only undoing needs."""


class Technique(Protocol):
    """The module ``<technique>/attach.py``."""

    def resolve(self, sections: Sequence[Any], context: Context) -> Any:
        """Which sites are meant. Raises PlanError, changes nothing."""

    def attach(self, resolved: Any, context: Context) -> Attached:
        """Apply. Every change is registered on ``context.undo`` before the next one is made."""


@dataclass
class Context:
    """What techniques share while they attach.

    Args:
        denoisers: the pipeline's denoisers.
        encoders: its networks of transformers, which techniques touch only where a plan names them.
        clock: where the loop stands.
        artefacts: calibrated tensors of the plan.
        originals: where replaced weights wait: ``cpu``, ``disk`` or ``device``.
        profile: whether to measure seconds.
        pipeline: the pipeline, or None for a bare denoiser.
    """

    denoisers: tuple[Denoiser, ...]
    clock: Clock
    artefacts: Artefacts
    originals: str = "cpu"
    profile: bool = False
    pipeline: Any = None
    encoders: tuple[Denoiser, ...] = ()
    undo: ExitStack = field(default_factory=ExitStack)
    roots: dict[str, RootHook] = field(default_factory=dict)

    def root(self, denoiser: Denoiser) -> RootHook:
        """The hook on this denoiser's root; installed (and the clock started) when first asked for."""
        if denoiser.component not in self.roots:
            if not self.roots:
                self.undo.callback(self.clock.detach)
                self.clock.attach()
            hook = RootHook(denoiser, self.clock, profile=self.profile)
            self.undo.callback(install(denoiser.module, hook, "root"))
            self.roots[denoiser.component] = hook
        return self.roots[denoiser.component]
