"""What a comparison was asked to do: checked before anything runs, and written down so that runs never mix."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline
from torch import nn

from diffaccel.denoiser import find_denoisers, unwrap_compiled
from diffaccel.errors import InputError, PlanError
from diffaccel.eval.feature_store import Folder
from diffaccel.eval.generate import steps_of
from diffaccel.eval.sets import ChosenSet
from diffaccel.eval.store import REFERENCE
from diffaccel.key import config_digest, weights_fingerprint
from diffaccel.pipelines.tasks import check_arguments
from diffaccel.plan import Plan

FEWER_STEPS = "fewer steps"
FORMAT = 2
"""Of the run's folder: one of another format is refused."""
_OURS = ("generator", "output_type", "return_dict")


@dataclass(frozen=True)
class Request:
    """What `diffaccel.eval.compare.compare` was asked for; its arguments under their names."""

    pipe: Any
    plans: Mapping[str, Any]
    prompts: Sequence[Any]
    seeds: Sequence[int]
    calls: Mapping[str, Any]
    controls: Sequence[Any]
    repeats: int
    turn: int
    noise_floor: bool
    measures: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()

    @property
    def steps(self) -> int | None:
        """``num_inference_steps`` of each call, None where there is none to set."""
        return steps_of(self.pipe, self.calls)

    def check(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: names the value and what to give instead.
            PlanError: the pipeline is already accelerated.
            ModelError: no denoiser in the pipeline.
        """
        for denoiser in find_denoisers(self.pipe):
            if "_diffaccel" in denoiser.module.__dict__:
                raise PlanError(f"{denoiser.component} is already accelerated; call remove(), compare applies plans")
        prompts, seeds = self.prompts, self.seeds
        if isinstance(prompts, str | bytes) or not prompts or not all(isinstance(p, str | Mapping) for p in prompts):
            raise InputError(f"prompts must be a list of texts (or of call arguments by name), got {prompts!r:.200}")
        if not seeds or not all(_is_whole(s, 0) for s in seeds) or len(set(seeds)) != len(seeds):
            raise InputError(f"seeds must be different whole numbers >= 0, got {seeds!r}")
        if REFERENCE in self.plans or not all(isinstance(n, str) and n for n in self.plans):
            raise InputError(f"plans need names other than {REFERENCE!r}, got {list(self.plans)}")
        if not _is_whole(self.repeats, 1) or not _is_whole(self.turn, 1):
            raise InputError(f"repeats and turn must be whole numbers >= 1, got {self.repeats!r} and {self.turn!r}")
        self._check_calls()
        self._check_controls()

    def _check_calls(self) -> None:
        for name in self.calls:
            if name in _OURS:
                raise InputError(f"calls holds {name!r}, which compare sets itself; use seeds= for the generator")
        if not isinstance(self.pipe, ModularPipeline):  # its call takes everything, and its blocks what they know
            check_arguments(self.pipe, self.calls)
        steps = self.calls.get("num_inference_steps")
        if steps is not None and not _is_whole(steps, 1):
            raise InputError(f"num_inference_steps must be a whole number >= 1, got {steps!r}")

    def _check_controls(self) -> None:
        for control in self.controls:
            if control != FEWER_STEPS and not _is_whole(control, 1):
                raise InputError(f"controls must be {FEWER_STEPS!r} or step counts >= 1, got {control!r}")
            if control != FEWER_STEPS and self.steps is None:
                raise InputError(f"control of {control} steps: these calls have no num_inference_steps to change")
            if control == self.steps:
                raise InputError(f"control of {control} steps is the reference itself; give another count")

    def settings(self, sets: Sequence[ChosenSet] = (), data: Folder | None = None) -> dict[str, Any]:
        """JSON-ready identity of a comparison: results under equal settings may stand in one table.

        Args:
            sets: the measures of whole rows.
            data: the folder that those compare with.
        """
        parameter = next(find_denoisers(self.pipe)[0].module.parameters())
        return {
            "format": FORMAT,
            "pipeline": type(self.pipe).__name__,
            "components": {name: _component(c) for name, c in self.pipe.components.items() if c is not None},
            "plans": {name: _plan(plan) for name, plan in self.plans.items()},
            "prompts": [plain(p) for p in self.prompts],
            "seeds": list(self.seeds),
            "calls": plain(self.calls),
            "steps": self.steps,
            "controls": list(self.controls),
            "repeats": self.repeats,
            "turn": self.turn,
            "noise_floor": self.noise_floor,
            "measures": list(self.measures),
            "extractors": {one.key: _network(one.extractor) for one in sets} or None,
            "against": None if data is None else f"{data.identity} in {data.path}",
            "peers": list(self.peers),
            "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else str(parameter.device),
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "diffaccel")},
        }


def conditions_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the settings that belongs beside every number."""
    names = ("pipeline", "device", "dtype", "threads", "calls", "repeats", "plans", "versions")
    return {name: settings[name] for name in names}


def plain(value: Any) -> Any:
    """``value`` in JSON's types; tensors and pictures by shape and digest."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):
        array = np.ascontiguousarray(value)
        return f"array {list(array.shape)} {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    return getattr(value, "__qualname__", None) or repr(value)


def _network(extractor: Any) -> str:
    """Identity of an extractor: of its weights, where it is a network or holds one."""
    owner = getattr(extractor, "__self__", extractor)
    network = owner if isinstance(owner, nn.Module) else getattr(owner, "network", None)
    return weights_fingerprint(network) if isinstance(network, nn.Module) else repr(type(owner).__qualname__)


def _component(component: Any) -> str:
    if isinstance(component, nn.Module):
        return weights_fingerprint(unwrap_compiled(component))
    config = getattr(component, "config", None)
    return f"{type(component).__name__} {config_digest(dict(config)) if isinstance(config, Mapping) else ''}".strip()


def _plan(plan: Any) -> Any:
    if callable(plan):
        return f"{getattr(plan, '__module__', '')}.{getattr(plan, '__qualname__', type(plan).__name__)}"
    if not isinstance(plan, Plan) and "/" in str(plan):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        return str(plan)
    body = {k: v for k, v in plan.to_dict().items() if k in ("name", "plan")}
    return {**body, "artefacts": plain(dict(sorted(plan.artefacts.items())))}


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
