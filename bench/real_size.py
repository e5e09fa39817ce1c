"""Released denoisers at full size and full depth on a fake CUDA GPU: predicted memory and host syncs under every plan.

    python bench/real_size.py                      # all seven, all plans: some minutes, no GPU and no download
    python bench/real_size.py --models flux_dev --plans balanced quantization

Each row runs the denoiser's forward (several steps where a cache has to decide) on fake bfloat16 tensors; its output
must have the shape, dtype and device of the plain forward.
"""

import argparse
import sys
import warnings
from pathlib import Path

from rich.console import Console
from rich.table import Table

from diffaccel import BlockSparse, Plan, Quantize, StepCache
from diffaccel.inspection import predict_memory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from real_size import REAL_SIZE, build_fake, fake_inputs

PLANS = {
    "plain": None,
    "lossless": "lossless",
    "balanced": "balanced",
    "fast": "fast",
    "quantization": Plan(quantization=[Quantize()]),
    "attention": Plan(attention=[BlockSparse(density=0.3)]),
    "caching": Plan(caching=StepCache()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(REAL_SIZE), choices=list(REAL_SIZE))
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    table = Table("model", "plan", "weights GiB", "peak GiB", "host syncs", "output")
    for name in options.models:
        model, inputs = build_fake(name), fake_inputs(name)
        expected: tuple[str, ...] | None = None
        for plan in options.plans:
            predicted = predict_memory(model, inputs, PLANS[plan], steps=4 if plan not in ("plain", "lossless") else 1)
            expected = expected or predicted.output
            if predicted.output != expected:
                raise SystemExit(f"{name} under {plan} gives {predicted.output}, the first plan gives {expected}")
            gib = (f"{value / 2**30:.2f}" for value in (predicted.weights_bytes, predicted.peak_bytes))
            row = (name, plan, *gib, str(sum(predicted.syncs.values())), ", ".join(predicted.output))
            table.add_row(*row)
            console.print(*row, style="dim")
    console.print(table)


if __name__ == "__main__":
    main()
