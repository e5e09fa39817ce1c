"""`distill`: a smaller or cheaper denoiser learns to give what its teacher gives."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from diffaccel.denoiser import Denoiser, find_denoisers
from diffaccel.distillation.lora import add_lora, drop_lora, merge_lora
from diffaccel.distillation.pictures import captioned, record_pictures
from diffaccel.distillation.recording import record_teacher
from diffaccel.distillation.settings import Distillation
from diffaccel.distillation.trainer import Trainer
from diffaccel.errors import InputError, PlanError
from diffaccel.recording import requests_of, run_pipeline


def distill(
    pipe: Any,
    *,
    teacher: Any = None,
    prompts: Any = None,
    data: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str],
    settings: Distillation | None = None,
    runs: int | None = None,
    component: str | None = None,
    quiet: bool = False,
    **call: Any,
) -> Path:
    """Train a denoiser of ``pipe`` in place. What was done is in ``folder``, where one that was cut off goes on.

    Heal a pruned pipeline by its original, or give ``settings=Distillation(guidance=True, lora=32)`` and no teacher, to
    learn in one call what classifier-free guidance makes of two: afterwards call with ``guidance_scale=1``.

    Args:
        pipe: the pipeline whose denoiser learns; not accelerated (a pruned one: baked).
        teacher: the pipeline to learn from, of the same kind; None: ``pipe`` itself as it is now.
        prompts: of the teacher's runs, from whose steps the student learns, or the arguments of a call each.
        data: instead, a folder of pictures with captions: what is learnt is the teacher's answer to noisy pictures (and
            with ``task`` in the settings the right one).
        folder: for the recorded runs (``teacher``), ``curve.csv``, the state and sample pictures.
        settings: by default `Distillation()`.
        runs: of the teacher; by default one for each prompt.
        component: which denoiser, where there are several.
        quiet: no progress bar.
        **call: further arguments of every call of the teacher's pipeline, such as ``num_inference_steps``.

    Returns:
        ``folder``.

    Raises:
        PlanError: an accelerated or quantized student, a teacher whose denoiser takes something else, or guidance that
            the teacher does not use.
        InputError: no prompts, a folder of another training, calls that cannot be recorded.
    """
    settings = settings or Distillation()
    if (prompts is None) == (data is None):
        raise InputError("distill needs either prompts of the teacher's runs or data, a folder of pictures")
    pictures = None if data is None else captioned(Path(data))
    requests = requests_of(prompts if pictures is None else [text for _, text in pictures])
    if settings.task and pictures is None:
        raise InputError(
            "Distillation(task=...) needs data=, a folder of pictures: a teacher's runs have no other answer"
        )
    student = _denoiser(pipe, component)
    guide = _denoiser(teacher or pipe, component)
    _check(student, guide, settings, self_taught=teacher is None)
    folder = Path(folder)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        recording = progress.add_task("teacher's runs", total=runs or len(requests))
        on_cpu = next(student.module.parameters()).device.type == "cpu"
        with PartialState(cpu=on_cpu).main_process_first():  # the others find its files
            recorder: Any = record_teacher
            what: dict[str, Any] = {"runs": runs or len(requests), "guidance": settings.guidance}
            source: Any = requests
            if data is not None:
                recorder, what, source = record_pictures, {}, Path(data)
            files, recorded = recorder(
                *(teacher or pipe, guide, source, call, folder / "teacher"),
                seed=settings.seed,
                notify=lambda done, of: progress.update(recording, completed=done, total=of),
                **what,
            )
        training = progress.add_task("learning", total=settings.steps)

        def show(step: int, loss: float) -> None:
            progress.update(training, completed=step, description=f"learning, loss {loss:.4f}")

        asked = [p.requires_grad for p in student.module.parameters()]
        plain = list(student.module.parameters())
        was_training = student.module.training
        student.module.eval()
        compared = None if guide.module is student.module else guide
        if compared is not None:
            compared.module.eval()
        try:
            trainer = Trainer(
                *(student, compared, files, recorded, settings, folder),
                trained=_trained(student, settings),
                sample=_sampler(pipe, requests, call, settings),
                show=show,
            )
            trainer.run()
            if settings.lora:
                merge_lora(student.module)
        finally:
            drop_lora(student.module)
            for parameter, value in zip(plain, asked, strict=True):
                parameter.requires_grad_(value)
            student.module.train(was_training)
    return folder


def _trained(student: Denoiser, settings: Distillation) -> list[nn.Parameter]:
    """What learns: adapters, or all weights but those of the frozen blocks."""
    frozen = [f"{name}." for name, _ in student.blocks[: round(settings.freeze * len(student.blocks))]]
    if settings.lora:
        adapters = add_lora(student, settings.lora, settings.lora_sites, settings.seed)
        names = {id(p): n for n, p in student.module.named_parameters()}
        kept = [p for p in adapters if not names[id(p)].startswith(tuple(frozen))]
    else:
        kept = [p for n, p in student.module.named_parameters() if not n.startswith(tuple(frozen))]
        student.module.requires_grad_(False)
    for parameter in kept:
        parameter.requires_grad_(True)
    if not kept:
        raise InputError(f"Distillation(freeze={settings.freeze:g}) leaves nothing to learn; lower it")
    return kept


def _sampler(
    pipe: Any, requests: Sequence[dict[str, Any]], call: dict[str, Any], settings: Distillation
) -> Callable[[int], Any]:
    """Makes the picture of the first request."""

    def sample(step: int) -> Any:
        arguments = {**call, **requests[0], "output_type": "pil"}
        if settings.guidance:
            arguments["guidance_scale"] = 1.0
        output = run_pipeline(pipe, arguments, settings.seed)
        pictures = output.images if hasattr(output, "images") else output.frames[0]
        return pictures[0]

    return sample


def _denoiser(pipe: Any, component: str | None) -> Denoiser:
    if isinstance(pipe, nn.Module):
        raise PlanError(f"distill runs pipelines, got the bare denoiser {type(pipe).__name__}; give its pipeline")
    denoisers = find_denoisers(pipe)
    names = [d.component for d in denoisers]
    if component is None and len(denoisers) > 1:
        raise InputError(f"{type(pipe).__name__} has several denoisers; give component= one of {', '.join(names)}")
    if component is not None and component not in names:
        raise InputError(f"{type(pipe).__name__} has no denoiser {component!r}; it has {', '.join(names)}")
    return denoisers[0] if component is None else denoisers[names.index(component)]


def _check(student: Denoiser, guide: Denoiser, settings: Distillation, *, self_taught: bool) -> None:
    for denoiser in (student, guide):
        if "_diffaccel" in denoiser.module.__dict__ and denoiser is student:
            raise PlanError(
                f"{denoiser.component} is accelerated; bake() a pruned one and remove() any other before it learns"
            )
    for name, parameter in student.module.named_parameters():
        if not parameter.is_floating_point() or type(parameter.data) is not torch.Tensor:
            raise PlanError(f"{student.component}.{name} is quantized; distil first, then quantize")
    sixteen = any(p.dtype in (torch.float16, torch.bfloat16) for p in student.module.parameters())
    if sixteen and not settings.lora:
        raise InputError(
            f"the weights of {student.component} have 16 bits, in which small updates are lost: load the student with "
            "dtype='float32' (precision='bf16' computes in 16 bits all the same), or train adapters (lora=16)"
        )
    if getattr(student.module, "is_quantized", False):
        raise PlanError(f"{student.component} is quantized; distil first, then quantize")
    if type(student.module) is not type(guide.module):
        raise PlanError(
            f"a {type(student.module).__name__} cannot learn from a {type(guide.module).__name__}: their calls differ"
        )
    if settings.guidance and settings.task:
        raise InputError("Distillation(guidance=True) learns from runs; task is for pictures")
    if self_taught and not settings.guidance:
        raise InputError("without a teacher there is nothing to learn but guidance: give teacher= or guidance=True")
