"""diffaccel makes diffusers pipelines generate images and videos faster and in less memory, and measures the cost.

>>> import diffaccel
>>> with diffaccel.accelerate(pipe, "balanced") as accel:   # doctest: +SKIP
...     image = pipe("a red circle").images[0]
...     print(accel.report())
"""

from importlib import import_module as _import_module
from importlib.util import find_spec as _find_spec
from typing import TYPE_CHECKING, Any

if _find_spec("diffaccel.kernels") is None:
    raise ImportError(
        "diffaccel was imported from a source checkout that is not installed: kernels/, pipelines/, eval/ and assets/ "
        "are mapped into the package by the install. Run `pip install -e .` in the checkout."
    )

from diffaccel.attention.section import BlockSparse
from diffaccel.caching.section import StepCache
from diffaccel.distillation.settings import Distillation
from diffaccel.errors import DiffAccelError, InputError, MissingPackageError, ModelError, PlanError
from diffaccel.exact.section import ExactReuse
from diffaccel.guidance.section import GuidanceReuse
from diffaccel.plan import Plan
from diffaccel.pruning.section import LowRank, Pruning
from diffaccel.quantization.register import register as _register_quantizer
from diffaccel.quantization.section import Quantize
from diffaccel.tokens.section import MergeTokens
from diffaccel.tuning.budget import Budget

if TYPE_CHECKING:
    from diffaccel.attach import Accelerated, accelerate
    from diffaccel.calibration import calibrate
    from diffaccel.distillation.distill import distill
    from diffaccel.pruning.ecodiff import EcoDiff
    from diffaccel.pruning.prune import prune
    from diffaccel.quantization.config import DiffAccelConfig
    from diffaccel.quantization.nunchaku import export_nunchaku
    from diffaccel.quantization.reconstruct import learn_rounding
    from diffaccel.quantizing import quantize
    from diffaccel.tuning.tune import tune

__all__ = [
    "Accelerated",
    "BlockSparse",
    "Budget",
    "DiffAccelConfig",
    "DiffAccelError",
    "Distillation",
    "EcoDiff",
    "ExactReuse",
    "GuidanceReuse",
    "InputError",
    "LowRank",
    "MergeTokens",
    "MissingPackageError",
    "ModelError",
    "Plan",
    "PlanError",
    "Pruning",
    "Quantize",
    "StepCache",
    "accelerate",
    "calibrate",
    "distill",
    "export_nunchaku",
    "learn_rounding",
    "prune",
    "quantize",
    "tune",
]

_LAZY = {
    "Accelerated": "diffaccel.attach",
    "DiffAccelConfig": "diffaccel.quantization.config",
    "EcoDiff": "diffaccel.pruning.ecodiff",
    "accelerate": "diffaccel.attach",
    "calibrate": "diffaccel.calibration",
    "export_nunchaku": "diffaccel.quantization.nunchaku",
    "distill": "diffaccel.distillation.distill",
    "learn_rounding": "diffaccel.quantization.reconstruct",
    "prune": "diffaccel.pruning.prune",
    "quantize": "diffaccel.quantizing",
    "tune": "diffaccel.tuning.tune",
}


_register_quantizer()  # so that diffusers' from_pretrained knows what we saved


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first used, so that plans can be built and checked without it."""
    if name in _LAZY:
        return getattr(_import_module(_LAZY[name]), name)
    if name in ("pipelines", "kernels", "eval", "assets"):
        return _import_module(f"diffaccel.{name}")
    raise AttributeError(f"module 'diffaccel' has no attribute {name!r}")
