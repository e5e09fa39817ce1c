"""How the tokens of each attention call lie, learned from the first call of each denoiser, as sparse attention does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from diffaccel.attention.intercept import SiteHook
from diffaccel.attention.layout import Geometry
from diffaccel.attention.learn import Learner
from diffaccel.attention.section import BlockSparse
from diffaccel.clock import Call, Clock
from diffaccel.denoiser import Denoiser
from diffaccel.hooks import install
from diffaccel.root import Compute
from diffaccel.technique import Context

Layouts = dict[tuple[str, int], str]
"""Component and number of tokens -> the layout in words."""

_ALL = BlockSparse(density=1.0, steps=(0.0, 1.0), block_size=16)  # asks for layouts, and computes every call densely


@contextmanager
def learning_layouts(denoisers: Sequence[Denoiser], pipeline: Any) -> Iterator[Layouts]:
    """Inside the block each denoiser's first call is learned from; yields what is filled."""
    layouts: Layouts = {}
    with ExitStack() as undo:
        context = undo.enter_context(_closing(Context(tuple(denoisers), Clock(pipeline), {})))  # type: ignore[arg-type]
        for denoiser in denoisers:
            _attach(denoiser, context, layouts)
        yield layouts


@contextmanager
def _closing(context: Context) -> Iterator[Context]:
    with context.undo:
        yield context


def _attach(denoiser: Denoiser, context: Context, layouts: Layouts) -> None:
    sites = [site for site in denoiser.attentions if site.role != "cross"]
    hooks = [SiteHook() for _ in sites]
    at_root = None
    for site, hook in zip(sites, hooks, strict=True):
        if site.module is denoiser.module:
            at_root = hook  # the root's own hook stands below: its mode is entered by hand
        else:
            context.undo.callback(install(site.module, hook, "inspection"))
    root = context.root(denoiser)
    latents = next(iter(inspect.signature(denoiser.module.forward).parameters), "")
    learner = Learner(root, denoiser.module, hooks, [[_ALL]] * len(sites), latents)

    def run(compute: Compute) -> Any:
        with (at_root.mode() if at_root is not None else None) or nullcontext():
            return compute()

    def wrapper(call: Call, arguments: Mapping[str, Any], compute: Compute) -> Any:
        if call.run and any(component == denoiser.component for component, _ in layouts):
            return compute()
        geometry = Geometry(arguments, denoiser.config, latents)
        learned, output, _ = learner.learn(geometry, [None] * len(sites), partial(run, compute))
        for tokens, layout in learned.layouts.items():
            text = "no image tokens" if layout is None else f"{layout}{'; ' + layout.note if layout.note else ''}"
            layouts[denoiser.component, tokens] = text
        return output

    root.wrappers.append(wrapper)
