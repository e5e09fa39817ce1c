"""Step caching around a denoiser's calls: one decision per step, one memory per branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from diffaccel.caching.decisions import Decisions
from diffaccel.caching.memory import Memory, RootMemory, StackMemory
from diffaccel.caching.policies import Policy
from diffaccel.caching.section import StepCache
from diffaccel.caching.stack import Ask, Stack
from diffaccel.clock import Call
from diffaccel.latents import latent_tensors
from diffaccel.root import Compute


class CachedRoot:
    """Runs around every call of one denoiser.

    The call that comes first in a step decides for the step; the other branches follow where they can. With a policy
    that looks inside the stack each branch decides for itself. A denoiser's first call in a run is always computed,
    also where it takes over in the middle of a trajectory (Wan 2.2).

    Args:
        stack: the blocks that are skipped; None: whole calls are.
    """

    def __init__(self, section: StepCache, decisions: Decisions, stack: Stack | None = None) -> None:
        self._section = section
        self._decisions = decisions
        self._stack = stack
        self._notes: dict[str, None] = {}  # a set in order
        self._idle: str | None = None  # why the last run was left alone
        self.computed = self.reused = self.nbytes = 0
        self.computed_steps: list[int] = []
        self._begin(None)

    @property
    def notes(self) -> list[str]:
        """What a user should know; why a run was left alone holds for the last run, as ``computed_steps`` does."""
        refusal = self._stack.refusal if self._stack else None
        instead = "nothing is skipped" if self._section.looks_inside else "whole calls are skipped instead"
        refused = [f"the block stack is left alone, {instead}: {refusal}"] if refusal else []
        return [*self._notes, *refused, *([self._idle] if self._idle else [])]

    @property
    def expected_psnr(self) -> float | None:
        """In dB, of the last run, where a schedule was chosen for it that skips anything."""
        chosen = self._decisions.chosen
        return chosen.psnr if chosen is not None and math.isfinite(chosen.psnr) else None

    def _begin(self, run: int | None) -> None:
        self._run = run
        self._step = -1
        self._skip = False
        self._skips: dict[str, int] = {}  # consecutive ones, by branch
        self._memories: dict[str, Memory] = {}
        self._policies: dict[str, Policy] = {}

    def __call__(self, call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run != self._run or call.step < self._step:
            self._begin(call.run)
            self.computed_steps = []
            self._idle = None
        latents = latent_tensors(arguments)
        if reason := self._never(call, latents):
            self._idle = reason
            output = self._guarded(compute)
            self._count(call, skipped=False)
            return output
        copies = self._section.policy == "easy" or self._section.forecast == "residual"
        inputs = [x.detach().clone() for x in latents] if copies else latents
        at = call.timestep if call.timestep is not None else float(call.step)
        memory = self._memories.get(call.branch)
        if memory is None or not memory.fits(inputs):  # new, or another size in the middle of a run
            in_stack = self._stack is not None and self._stack.refusal is None
            memory = (
                StackMemory(self._stack)  # type: ignore[arg-type]
                if in_stack
                else RootMemory(self._section.forecast, self._decisions.slope(call.branch))
            )
            self._memories[call.branch] = memory
            self._policies.pop(call.branch, None)
        if self._section.looks_inside:
            return self._asked(call, memory, inputs, at, compute)
        policy = None
        if call.step != self._step:
            self._step = call.step
            policy = self._policy(call)
            policy.look(inputs, at, call.step)
            self._skip = not memory.empty and self._free(call, "") and policy.skip()
            self._skips[""] = self._skips.get("", 0) + 1 if self._skip else 0
        output, skipped = self._made(call, memory, inputs, at, compute, self._skip and not memory.empty)
        if not skipped and policy is not None and not memory.empty:
            policy.learn(memory.copies(output))
        return output

    def _asked(self, call: Call, memory: Memory, inputs: list[Tensor], at: float, compute: Compute) -> Any:
        """A call in which the policy decides after the front blocks, by what they added; each branch for itself."""
        policy, free = self._policy(call), not memory.empty and self._free(call, call.branch)

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
        self, call: Call, memory: Memory, inputs: list[Tensor], at: float, compute: Compute, skip: bool | Ask
    ) -> tuple[Any, bool]:
        """The output, and whether the call was skipped; counted."""
        output, skipped = self._guarded(lambda: memory.run(inputs, at, compute, skip))
        self._count(call, skipped)
        self.nbytes = max(self.nbytes, sum(m.nbytes for m in self._memories.values()))
        if not skipped and memory.empty and isinstance(memory, RootMemory):
            self._notes["the denoiser's output holds no floating tensor: nothing is cached"] = None
        return output, skipped

    def _guarded(self, compute: Callable[[], Any]) -> Any:
        try:
            return compute()
        except BaseException:
            self._begin(None)
            raise

    def _count(self, call: Call, skipped: bool) -> None:
        if skipped:
            self.reused += 1
            return
        self.computed += 1
        if self.computed_steps[-1:] != [call.step]:
            self.computed_steps.append(call.step)

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

    def _free(self, call: Call, branch: str) -> bool:
        """Whether the plan lets this step be skipped; "" counts the skips of all branches together."""
        s = self._section
        if self._skips.get(branch, 0) >= s.max_skips:
            return False
        if call.steps is None:
            return call.progress >= s.protect_first
        return math.ceil(s.protect_first * call.steps) <= call.step < call.steps - s.protect_last

    def _policy(self, call: Call) -> Policy:
        if call.branch not in self._policies:
            self._policies[call.branch], note = self._decisions.policy(call)
            if note:
                self._notes[note] = None
        return self._policies[call.branch]
