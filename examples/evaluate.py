"""What a plan gains and costs, beside fewer steps at the same cost. Runs anywhere: ``python examples/evaluate.py``."""

from rich import print as show

import diffaccel
from diffaccel.eval.compare import compare
from diffaccel.eval.figures import side_by_side

wrapped = diffaccel.pipelines.load("bundled:image")
prompts = diffaccel.pipelines.BUNDLED["bundled:image"].prompts()[:4]

plans = {"balanced": "balanced", "cache 0.1": diffaccel.Plan(caching=diffaccel.StepCache(threshold=0.1))}
result = compare(wrapped, plans, prompts, progress=False)

show(result)  # speed of the denoising loop, fidelity to the original outputs, memory; the dim rows are the controls
side_by_side(result, "balanced", "evaluate.png")
