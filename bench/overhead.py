"""What acceleration itself costs: time per denoiser call of plans that change nothing, beside the untouched model.

    python bench/overhead.py            # the bundled image pipeline's denoiser
    python bench/overhead.py --calls 400

Rows: an empty plan (attaches nothing), and the root hook alone (what any cache or step range needs). Calls of all rows
are interleaved, so that drift of the machine cancels; medians, and their ratio to the untouched model.
"""

import argparse
from functools import partial

import torch
from diffusers import PixArtTransformer2DModel
from rich.console import Console
from rich.table import Table

from diffaccel import Plan, StepCache, accelerate
from diffaccel.assets import path
from diffaccel.eval.timing import interleave

NEVER = Plan(caching=StepCache(protect_first=1.0))  # watches every call, skips none


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=200, help="denoiser calls per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = {"untouched": None, "empty plan": Plan(), "root hook, nothing skipped": NEVER}
    models = {name: PixArtTransformer2DModel.from_pretrained(path("shapes-image/transformer")).float() for name in rows}
    handles = [accelerate(models[name], plan) for name, plan in rows.items() if plan is not None]
    inputs = dict(
        hidden_states=torch.randn(2, models["untouched"].config.in_channels, 32, 32),
        encoder_hidden_states=torch.randn(2, 32, 128),
        timestep=torch.full((2,), 500),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    with torch.no_grad():
        timings = interleave({n: partial(m, **inputs) for n, m in models.items()}, options.calls, 5, progress=True)
    for handle in handles:
        handle.remove()
    medians = {name: timing.median for name, timing in timings.items()}
    table = Table("row", "ms per call (median)", "ratio", title=f"{options.calls} calls, {options.threads} threads")
    for name, median in medians.items():
        table.add_row(name, f"{median * 1e3:.2f}", f"{median / medians['untouched']:.4f}")
    Console().print(table)


if __name__ == "__main__":
    main()
