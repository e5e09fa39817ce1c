"""Step caching around a denoiser's calls: one decision per step and group of parts, one memory per branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from diffaccel.caching.allowance import Allowance
from diffaccel.caching.decisions import Decisions
from diffaccel.caching.memory import Memory, Part, RootMemory, Skip, memory_of
from diffaccel.caching.policies import Policy
from diffaccel.caching.section import StepCache
from diffaccel.caching.sites import Sites
from diffaccel.clock import Call
from diffaccel.latents import latent_tensors
from diffaccel.root import Compute
from diffaccel.timeline import Timeline


class CachedRoot:
    """Runs around every call of one denoiser.

    The call that comes first in a step decides for the step; the other branches follow where they can. With a policy
    that looks inside the stack each branch decides for itself. A denoiser's first call in a run is always computed,
    also where it takes over in the middle of a trajectory (Wan 2.2).

    Args:
        part: what is skipped; None: whole calls are.
        allowance: of bytes to keep, shared with the pipeline's other denoisers.
    """

    def __init__(
        self, section: StepCache, decisions: Decisions, part: Part | None = None, allowance: Allowance | None = None
    ) -> None:
        self._section = section
        self._decisions = decisions
        self._part = part
        self._groups = part.groups if isinstance(part, Sites) else ("",)
        self._allowance = allowance or Allowance()
        self._notes: dict[str, None] = {}  # a set in order
        self._idle: str | None = None  # why the last run was left alone
        self.computed = self.reused = self.nbytes = 0
        self.timeline = Timeline()
        self._begin(None)

    @property
    def notes(self) -> list[str]:
        """What a user should know; why a run was left alone holds for the last run, as the timeline does."""
        refusal = None if self._part is None or isinstance(self._part, Sites) else self._part.refusal
        instead = "nothing is skipped" if self._section.looks_inside else "whole calls are skipped instead"
        refused = [f"the {_PARTS[self._section.granularity]} is left alone, {instead}: {refusal}"] if refusal else []
        return [*self._notes, *refused, *([self._idle] if self._idle else [])]

    @property
    def expected_psnr(self) -> float | None:
        """In dB, of the last run, where a schedule was chosen for it that skips anything."""
        chosen = self._decisions.chosen
        return chosen.psnr if chosen is not None and math.isfinite(chosen.psnr) else None

    def _begin(self, run: int | None) -> None:
        self._run = run
        self._step = -1
        self._skip: dict[str, bool] = {}
        self._skips: dict[str, int] = {}  # consecutive ones, by group; by branch where each decides for itself
        self._memories: dict[str, Memory] = {}
        self._policies: dict[tuple[str, str], Policy] = {}
        self._allowance.give_back(self)

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run or call.step < self._step:
            self._begin(call.run)
            self.timeline = Timeline()
            self._idle = None
        latents = latent_tensors(arguments)
        if reason := self._never(call, latents):
            self._idle = reason
            output = self._guarded(compute)
            self._count(call, dict.fromkeys(self._groups, False))
            return output
        copies = self._section.policy == "easy" or self._section.forecast == "residual"
        inputs = [x.detach().clone() for x in latents] if copies else latents
        at = call.timestep if call.timestep is not None else float(call.step)
        memory = self._memory(call, inputs)
        if self._section.looks_inside:
            return self._asked(call, memory, inputs, at, compute)
        policies: dict[str, Policy] = {}
        if call.step != self._step:
            self._step = call.step
            for group in self._groups:
                policy = policies[group] = self._policy(call, group)
                policy.look(inputs, at, call.step)
                self._skip[group] = not memory.empty and self._free(call, group) and policy.skip()
                self._skips[group] = self._skips.get(group, 0) + 1 if self._skip[group] else 0
        skip = {group: self._skip[group] and not memory.empty for group in self._groups}
        output, _ = self._made(call, memory, inputs, at, compute, skip)
        memory = self._memories[call.branch]
        if not memory.empty:
            for group, policy in policies.items():
                if not skip[group]:
                    policy.learn(memory.copies(output))
        return output

    def _memory(self, call: Call, inputs: list[Tensor]) -> Memory:
        """That of the call's branch; a fresh one where there is none, or for another size in the middle of a run."""
        memory = self._memories.get(call.branch)
        if memory is None or not memory.fits(inputs):
            memory = self._fresh(call)
            for group in self._groups:
                self._policies.pop((call.branch, group), None)
        return memory

    def _fresh(self, call: Call) -> Memory:
        self._allowance.give_back(self, call.branch)
        allow = partial(self._allowance.take, self, call.branch)
        slope = self._decisions.slope(call.branch)
        memory = self._memories[call.branch] = memory_of(self._part, self._section.forecast, slope, allow)
        return memory

    def _asked(self, call: Call, memory: Memory, inputs: list[Tensor], at: float, compute: Compute) -> Any:
        """A call in which the policy decides after the front blocks, by what they added; each branch for itself."""
        policy, free = self._policy(call, ""), not memory.empty and self._free(call, call.branch)

        def ask(added: list[Tensor]) -> bool:
            policy.look(added, at, call.step)
            skip = free and policy.skip()
            if not skip:
                policy.learn(added)
            return skip

        output, skipped = self._made(call, memory, inputs, at, compute, ask)
        self._skips[call.branch] = self._skips.get(call.branch, 0) + 1 if skipped else 0
        return output

    def _made(
        self, call: Call, memory: Memory, inputs: list[Tensor], at: float, compute: Compute, skip: Skip
    ) -> tuple[Any, bool]:
        """The output, and whether the call was skipped; counted."""
        output, skipped = self._guarded(lambda: memory.run(inputs, at, compute, skip))
        if not (skipped or callable(skip) or isinstance(memory, RootMemory) or memory.fits(inputs)):
            # The part has just turned out not to be followable: remember the call as a whole, as later runs will.
            self._fresh(call).run(inputs, at, lambda: output, dict.fromkeys(self._groups, False))
        self._count(call, {"": skipped} if callable(skip) else skip)
        self.nbytes = max(self.nbytes, sum(m.nbytes for m in self._memories.values()))
        if not skipped and memory.empty and isinstance(memory, RootMemory) and not self._allowance.refused:
            self._notes["the denoiser's output holds no floating tensor: nothing is cached"] = None
        return output, skipped

    def _guarded(self, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except BaseException:
            self._begin(None)
            raise

    def _count(self, call: Call, skipped: Mapping[str, bool]) -> None:
        whole = all(skipped.values())
        self.reused += whole
        self.computed += not whole
        held = "reused" if self._section.forecast in ("hold", "residual") else "forecast"
        for group, left_out in skipped.items():
            row = f"{call.branch} {group}" if group else call.branch
            self.timeline.note(call.step, row, held if left_out else "computed", call.steps)

    def _never(self, call: Call, latents: list[Tensor]) -> str | None:
        """Why no call of this run can be skipped, or None."""
        if not latents:
            return "no argument of the denoiser holds floating latents: nothing is cached"
        if call.steps is not None and call.steps < self._section.min_steps:
            return f"a schedule of {call.steps} steps was left alone (min_steps is {self._section.min_steps})"
        if call.steps is None and call.timestep is None:
            return (
                "where the loop stands is unknown: call accel.clock.start(steps) before and advance() after each step"
            )
        return None

    def _free(self, call: Call, counted: str) -> bool:
        """Whether the plan lets this step be skipped; ``counted``: whose skips in a row are limited."""
        s = self._section
        if self._skips.get(counted, 0) >= self._decisions.most(counted):
            return False
        if call.steps is None:
            return call.progress >= s.protect_first
        return not s.is_protected(call.step, call.steps)

    def _policy(self, call: Call, group: str) -> Policy:
        key = (call.branch, group)
        if key not in self._policies:
            self._policies[key], note = self._decisions.policy(call, group)
            if note:
                self._notes[note] = None
        return self._policies[key]


_PARTS = {"stack": "block stack", "deep": "deep part"}
