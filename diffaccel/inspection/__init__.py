"""What a model consists of and where its parameters, operations, time and memory go."""

from diffaccel.inspection.inspect import inspect_model
from diffaccel.inspection.memory import MemoryPrediction, capture_inputs, predict_memory, predict_pipeline_memory
from diffaccel.inspection.render import draw
from diffaccel.inspection.structure import Inspection

__all__ = [
    "Inspection",
    "MemoryPrediction",
    "capture_inputs",
    "draw",
    "inspect_model",
    "predict_memory",
    "predict_pipeline_memory",
]
