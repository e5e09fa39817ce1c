"""What the kernels could gain on paper: operations and bytes at the shapes of real models, against a GPU's peaks.

The time of a kernel is bounded below by max(operations / peak rate, bytes / bandwidth) (the roofline model, Williams et
al., CACM 52(4), 2009). Every tensor is counted once, as if caches were perfect, and no kernel reaches its bound. A
ratio of two bounds is therefore the gain to hope for, not the gain that is had: on the card `_candidates` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

# Seconds that pass between two kernels' starts, at best, when a queue is full: what is shorter gains nothing.
LAUNCH = 3e-6


@dataclass(frozen=True)
class Gpu:
    """Peak rates of dense matrices (no structured sparsity), sums in float32 or int32, in operations per second.

    A multiplication and an addition are two operations. bandwidth: bytes per second. fp8: None where there is none.
    """

    name: str
    bf16: float
    int8: float
    fp8: float | None
    bandwidth: float
    source: str

    def rate(self, form: str) -> float | None:
        """Peak of the products of a form of `linear_seconds`."""
        return {"bf16": self.bf16, "w4a16": self.bf16, "int8": self.int8, "w4a8": self.int8, "fp8": self.fp8}[form]


GPUS = (
    Gpu("A100", 312e12, 624e12, None, 2.039e12, "NVIDIA A100 data sheet, SXM 80 GB"),
    # Sums in float32 run at half the rate of those in float16 on GeForce: integers do not pay for that.
    Gpu("RTX 4090", 165.2e12, 660.6e12, 330.3e12, 1.008e12, "NVIDIA Ada GPU Architecture white paper, appendix A"),
    Gpu("H100", 989.4e12, 1978.9e12, 1978.9e12, 3.35e12, "NVIDIA H100 data sheet, SXM"),
)


@dataclass(frozen=True)
class Linear:
    """``x`` [M, K] times a weight [N, K]. ``where``: the layers of the model that have this shape."""

    model: str
    where: str
    M: int
    N: int
    K: int


@dataclass(frozen=True)
class Attention:
    """Self-attention of ``tokens`` with ``heads`` of size ``size``, batch included in the heads."""

    model: str
    where: str
    heads: int
    tokens: int
    size: int


FLUX, SDXL, WAN = "FLUX.1-dev 1024 x 1024", "SDXL 1024 x 1024, guided", "Wan 2.1 14B 1280 x 720, 81 frames"
# Shapes of one call, as tests/test_roofline.py finds them in the models. Guidance doubles the batch of SDXL; FLUX.1-dev
# takes it as an input, and Wan runs twice.
LINEARS = (
    Linear(FLUX, "attn.q/k/v/out", 4096, 3072, 3072),
    Linear(FLUX, "ff.in", 4096, 12288, 3072),
    Linear(FLUX, "ff.out", 4096, 3072, 12288),
    Linear(FLUX, "attn.added", 512, 3072, 3072),
    Linear(FLUX, "fused.in", 4608, 12288, 3072),
    Linear(FLUX, "fused.out", 4608, 3072, 15360),
    Linear(FLUX, "modulation", 1, 18432, 3072),
    Linear(SDXL, "attn.q/k/v/out, 64 x 64", 8192, 640, 640),
    Linear(SDXL, "ff.in, 64 x 64", 8192, 5120, 640),
    Linear(SDXL, "attn.q/k/v/out, 32 x 32", 2048, 1280, 1280),
    Linear(SDXL, "ff.in, 32 x 32", 2048, 10240, 1280),
    Linear(SDXL, "ff.out, 32 x 32", 2048, 1280, 5120),
    Linear(SDXL, "cross.k/v", 154, 1280, 2048),
    Linear(WAN, "attn.q/k/v/out", 75600, 5120, 5120),
    Linear(WAN, "ff.in", 75600, 13824, 5120),
    Linear(WAN, "ff.out", 75600, 5120, 13824),
    Linear(WAN, "cross.k/v", 512, 5120, 5120),
)
ATTENTIONS = (
    Attention(FLUX, "all blocks", 24, 4608, 128),
    Attention(SDXL, "64 x 64", 2 * 10, 4096, 64),
    Attention(SDXL, "32 x 32", 2 * 20, 1024, 64),
    Attention(WAN, "all blocks", 40, 75600, 128),
)
DENSITIES = (0.5, 0.3, 0.2)


def linear_seconds(shape: Linear, gpu: Gpu, form: str) -> float | None:
    """Bound for a linear layer with bf16 input and output; None where the GPU lacks the form.

    8-bit forms, ``"w4a8"`` among them, are two kernels: quantise (reads bf16, writes 8 bits and a scale per row), then
    multiply. Weights of 4 bits are counted without their multipliers, a sixty-fourth more.
    """
    rate = gpu.rate(form)
    if rate is None:
        return None
    M, N, K = shape.M, shape.N, shape.K
    wide = form in ("bf16", "w4a16")
    activations = 2 if wide else 1
    weights = {"bf16": 2.0, "w4a16": 0.5, "w4a8": 0.5}.get(form, 1.0)
    multiply = max(2 * M * N * K / rate, (activations * M * K + weights * N * K + 2 * M * N) / gpu.bandwidth)
    return multiply if wide else max(multiply, LAUNCH) + quantize_seconds(shape, gpu)


def quantize_seconds(shape: Linear, gpu: Gpu) -> float:
    """Bound for bringing ``x`` to 8 bits; nothing of it remains where a normalisation before it does it in passing."""
    return max(shape.M * (3 * shape.K + 4) / gpu.bandwidth, LAUNCH)


def attention_seconds(shape: Attention, gpu: Gpu, density: float = 1.0) -> float:
    """Bound for attention in bf16 over the kept fraction of the blocks. Exponentials are not counted."""
    H, N, D = shape.heads, shape.tokens, shape.size
    return max(4 * density * H * N * N * D / gpu.bf16, 4 * 2 * H * N * D / gpu.bandwidth)


def permute_seconds(shape: Attention, gpu: Gpu) -> float:
    """Bound for reordering the tokens of queries, keys and values, and the output's back: each read and written."""
    return 4 * 2 * 2 * shape.heads * shape.tokens * shape.size / gpu.bandwidth


def linear_gain(shape: Linear, gpu: Gpu, form: str) -> float | None:
    """Bound of bf16 over that of ``form``: the most that is to be gained."""
    seconds = linear_seconds(shape, gpu, form)
    dense = linear_seconds(shape, gpu, "bf16")
    assert dense is not None
    return None if seconds is None else max(dense, LAUNCH) / seconds


def attention_gain(shape: Attention, gpu: Gpu, density: float) -> float:
    """Bound of dense attention over that of the sparse one with its tokens reordered."""
    return attention_seconds(shape, gpu) / (attention_seconds(shape, gpu, density) + permute_seconds(shape, gpu))


def linear_remark(shape: Linear, gpu: Gpu) -> str:
    """Where a quantised linear cannot win on this GPU, and which form is ahead."""
    dense, int8, fp8 = (linear_seconds(shape, gpu, form) for form in ("bf16", "int8", "fp8"))
    assert dense is not None and int8 is not None
    best = min(int8, fp8 or int8)
    if best > 0.9 * max(dense, LAUNCH):
        why = "a second launch" if dense < 2 * LAUNCH else "quantising the input"
        return f"cannot win: {why} costs what 8 bits save"
    if gpu.bandwidth * dense < 1.1 * 2 * (shape.M * (shape.N + shape.K) + shape.N * shape.K):
        return "limited by reading the weight: every 8-bit form gains the same"
    if fp8 is None:
        return "int8; no fp8 here"
    return "int8 ahead of fp8" if int8 < 0.9 * fp8 else "int8 cannot win against fp8: the same peak"


def attention_remark(shape: Attention, gpu: Gpu) -> str:
    """Where sparse attention cannot win on this GPU."""
    gains = {density: attention_gain(shape, gpu, density) for density in DENSITIES}
    winning = [density for density, gain in gains.items() if gain > 1.1]
    if not winning:
        return "cannot win: reordering the tokens costs what is left out"
    return "" if len(winning) == len(gains) else f"wins from density {max(winning)} down"
