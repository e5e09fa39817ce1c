"""How a network is healed or distilled. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from diffaccel.errors import InputError, did_you_mean

PRECISIONS = ("no", "bf16")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Settings of `diffaccel.distill`.

    Args:
        steps: updates of the weights.
        batch: recorded calls in an update.
        rate: largest learning rate (AdamW); it warms up over ``warmup`` steps and falls to a tenth along a cosine.
        warmup: see ``rate``.
        decay: weight decay.
        clip: largest norm of the gradient.
        output: weight of the distance to the teacher's output.
        features: weight of the distance to the teacher's block outputs (HierarchicalPrune, BK-SDM); 0 saves the
            teacher's calls.
        attention: likewise to the outputs of its self-attentions (KOALA, arXiv:2312.04005).
        task: weight of the distance to the noise or velocity of the data itself, where that is a folder of pictures.
        lora: rank of LoRA adapters that are trained instead of the weights and merged in the end; 0 trains the weights.
        lora_sites: which linears get adapters, see `diffaccel.sites`.
        freeze: share of the blocks, from the first, that keep their weights (positional weight preservation).
        guided_rates: learn more slowly where the loss reacts more (sensitivity-guided distillation).
        average: decay of the running average of the weights, which is what is kept in the end; 0 keeps the last.
        checkpointing: recompute activations in the backward pass to save memory.
        precision: ``no`` (as the weights are) or ``bf16`` autocast.
        guidance: the student gives in one call what the teacher gives with classifier-free guidance.
        seed: of the order of the data.
        save_every: steps between checkpoints.
        sample_every: steps between sample pictures; 0 for none.
    """

    steps: int = 1000
    batch: int = 4
    rate: float = 1e-4
    warmup: int = 20
    decay: float = 0.0
    clip: float = 1.0
    output: float = 1.0
    features: float = 0.0
    attention: float = 0.0
    task: float = 0.0
    lora: int = 0
    lora_sites: str = "attn.* cross.* ff.* fused.*"
    freeze: float = 0.0
    guided_rates: bool = False
    average: float = 0.99
    checkpointing: bool = False
    precision: str = "no"
    guidance: bool = False
    seed: int = 0
    save_every: int = 50
    sample_every: int = 0

    def __post_init__(self) -> None:
        whole = {"steps": 1, "batch": 1, "warmup": 0, "lora": 0, "seed": 0, "save_every": 1, "sample_every": 0}
        for name, least in whole.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"Distillation.{name} must be a whole number from {least}, got {value!r}")
        for name in ("rate", "decay", "clip", "output", "features", "attention", "task"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or value < 0 or (name in ("rate", "clip") and value == 0):
                raise InputError(f"Distillation.{name} must be a number above 0, got {value!r}")
        for name in ("freeze", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"Distillation.{name} must be in [0, 1), got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise InputError(
                f"Distillation.precision is {self.precision!r}{did_you_mean(str(self.precision), PRECISIONS)}"
            )
        if not self.output + self.features + self.attention + self.task:
            raise InputError("Distillation needs a loss: one of output, features, attention and task above 0")
        if self.guidance and (self.features or self.attention):
            raise InputError(
                "Distillation(guidance=True) has no teacher call to compare features with: its target is made of two; "
                "set features=0 and attention=0"
            )
