"""Step caching on the bundled pipelines: speed of the denoising loop and fidelity, beside fewer steps at the same cost.

    python bench/step_cache.py                        # both pipelines, every row, 16 prompts: 1 to 2 hours on 2 cores
    python bench/step_cache.py --model image --rows "trend .05" "hold .05" --controls 10 12
    python bench/step_cache.py --thresholds .03 .05 .08 --forecasts hold trend

Every prompt runs alone; all rows take turns, so that drift of the machine cancels. PSNR in dB against the unaccelerated
output of the same seed, on floats in [0, 1]: mean over prompts and mean of the worst tenth. Settings may be chosen by
these numbers: the prompts are not those that README's table reports on.
"""

import argparse
from itertools import product

import torch
from rich.console import Console

from diffaccel import Plan, StepCache, calibrate
from diffaccel.eval.compare import compare
from diffaccel.pipelines.bundled import bundled
from diffaccel.pipelines.loading import load

CONTROLS = {"image": (9, 10, 11, 12, 13), "video": (12, 15, 18, 20)}
FORECASTS = ("hold", "residual", "linear", "trend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("image", "video", "both"), default="both")
    parser.add_argument("--prompts", type=int, default=16, help="how many of the tuning prompts")
    parser.add_argument("--thresholds", type=float, nargs="+", default=(0.03, 0.05, 0.08, 0.12))
    parser.add_argument("--forecasts", nargs="+", choices=FORECASTS, default=FORECASTS)
    parser.add_argument("--rows", nargs="+", help="only rows whose name contains one of these")
    parser.add_argument("--controls", type=int, nargs="*", help="step counts of the control rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where results go, and an interrupted run goes on from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in ("image", "video") if options.model == "both" else (options.model,):
        run(kind, options)


def run(kind: str, options: argparse.Namespace) -> None:
    wrapped, known = load(f"bundled:{kind}"), bundled(f"bundled:{kind}")
    plans = {
        f"{forecast} {threshold:g}": Plan(caching=StepCache(threshold=threshold, forecast=forecast))
        for forecast, threshold in product(options.forecasts, options.thresholds)
    }
    plans |= {f"EasyCache {t:g}": Plan(caching=StepCache.easycache(t)) for t in options.thresholds}
    mag = calibrate(wrapped.pipe, StepCache.magcache(), prompts=known.example, **known.call)
    plans |= {
        f"MagCache {t:g}": Plan(caching=StepCache.magcache(t), artefacts=mag.artefacts, key=mag.key)
        for t in (0.06, 0.12)
    }
    if options.rows:
        plans = {name: plan for name, plan in plans.items() if any(part in name for part in options.rows)}
    folder = f"{options.folder}/{kind}" if options.folder else None
    controls = CONTROLS[kind] if options.controls is None else options.controls
    prompts = known.tuning_prompts()[: options.prompts]
    Console().print(compare(wrapped, plans, prompts, controls=controls, folder=folder))


if __name__ == "__main__":
    main()
