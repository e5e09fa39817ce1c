"""What a model consists of and where its parameters, operations, time and memory go."""

from diffaccel.inspection.inspect import inspect_model
from diffaccel.inspection.render import draw
from diffaccel.inspection.structure import Inspection

__all__ = ["Inspection", "draw", "inspect_model"]
