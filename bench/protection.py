"""What protecting constant outlying tokens of the text is worth (MixDQ's BOS-aware quantization), on a UNet.

    python bench/protection.py                 # under a minute on one core
    python bench/protection.py --size 320      # wider, closer to Stable Diffusion's

A Stable Diffusion UNet with random weights reads texts [batch, 77, K] whose first token is the same in all of them and
``outlier`` times as large as the others: *planted*, as CLIP's first token is by nature (MixDQ measured 823.5 beside 10
to 15). The row "CLIP" takes the hidden states of the bundled CLIP text encoder instead: a natural begin-of-sequence
token, if a small one. The projections of the text run with static int8 activations (one range for all tokens), and with
one scale for each token, where the outlier has a row of its own. Signal-to-noise ratio in dB of those projections'
outputs without the first token, and of the denoiser's output, with and without protection.
"""

import argparse
import math
import os
from dataclasses import replace
from types import SimpleNamespace

os.environ.setdefault("DIFFACCEL_KERNELS", "int8_linear=onednn;int8_static_linear=onednn")

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffaccel import Plan, Quantize, accelerate
from diffaccel.assets import path
from diffaccel.denoiser import Denoiser, select
from diffaccel.eval.metrics.clip import load_clip
from diffaccel.plan import Artefacts
from diffaccel.quantization.calibrate import recorders_of

TOKENS, TEXT = 77, 256
CAPTIONS = ["a red circle", "two small blue squares", "a green star on a gray background", "a yellow triangle"]
SECTIONS = {
    "static": Quantize(sites="cross.k cross.v", activations="static", float_activations=""),
    "per token": Quantize(sites="cross.k cross.v", float_activations=""),
}


def unet(size: int, text: int) -> UNet2DConditionModel:
    """Two levels, attention in the second."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(size, 2 * size),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return model.eval().requires_grad_(False)


def planted(outlier: float, seed: int) -> Tensor:
    """Texts [2, 77, 256]."""
    x = torch.randn(2, TOKENS, TEXT, generator=torch.Generator().manual_seed(seed))
    x[:, 0] = torch.randn(TEXT, generator=torch.Generator().manual_seed(0)) * outlier
    return x


def natural(seed: int) -> Tensor:
    """Hidden states of the bundled CLIP text encoder for two captions of its world, [2, tokens, K]."""
    clip = load_clip(f"local-dir:{path('shapes-clip')}")
    seen: list[Tensor] = []
    handle = clip.network.ln_final.register_forward_hook(lambda module, x, y: seen.append(y.detach()))
    clip.texts(CAPTIONS[2 * (seed % 2) :][:2])
    handle.remove()
    return seen[0]


def calibrated(model: UNet2DConditionModel, section: Quantize, texts: list[Tensor], x: Tensor) -> Artefacts:
    """What the projections of the text get for two texts."""
    (recorder,) = recorders_of([replace(section, protect=True)], [Denoiser.of(model, "unet")]).values()
    for run, text in enumerate(texts):
        recorder.follow(SimpleNamespace(progress=0.0, run=run), {}, None)
        model(x, 500, text)
    recorder.remove()
    return Artefacts(dict(recorder.artefacts()))


def decibels(exact: list[Tensor], got: list[Tensor]) -> float:
    """Signal-to-noise ratio over all of them."""
    noise = sum(float((a - b).square().sum()) for a, b in zip(exact, got, strict=True))
    return 10 * math.log10(sum(float(a.square().sum()) for a in exact) / max(noise, 1e-30))


@torch.no_grad()
def rows(size: int, texts: list[Tensor]) -> list[tuple[str, str, float, float]]:
    """Scheme, protected or not, SQNR of the projections and of the output; the last text was not calibrated on."""
    model, x = unet(size, texts[0].shape[-1]), torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    sites = select([Denoiser.of(model, "unet")], "cross.k cross.v", "layers")
    exact, output = [site.module(texts[-1])[:, 1:] for site in sites], model(x, 500, texts[-1]).sample
    found = []
    for name, section in SECTIONS.items():
        artefacts = calibrated(model, section, texts[:-1], x)
        constant = any(key.endswith(".constant") for key in artefacts)
        for protect in (False, True):
            values = artefacts if protect else calibrated_whole(artefacts, texts[:-1], sites)
            plan = Plan(quantization=replace(section, protect=protect), artefacts=values)
            with accelerate(model, plan):
                projected = [site.module(texts[-1])[:, 1:] for site in sites]
                of_output = decibels([output], [model(x, 500, texts[-1]).sample])
            how = "not protected" if not protect else "protected" if constant else "nothing to protect"
            found.append((name, how, decibels(exact, projected), of_output))
    return found


def calibrated_whole(artefacts: Artefacts, texts: list[Tensor], sites: list) -> Artefacts:
    """The ranges that hold the first token too, as calibration without protection measures them."""
    low, high = (torch.stack([getattr(t, end)((0, 1)) for t in texts]) for end in ("amin", "amax"))
    whole = dict(artefacts)
    for site in sites:
        key = f"quantization.{site.full_name}.limits"
        if key in whole:
            whole[key] = whole[key].clone()
            whole[key][0] = torch.stack([low.amin(0), high.amax(0)])
    return Artefacts(whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="channels of the UNet's first level")
    parser.add_argument("--outliers", type=float, nargs="+", default=[1, 10, 80], help="size of the planted token")
    options = parser.parse_args()
    cases = {f"planted, {o:g} times": [planted(o, seed) for seed in (1, 2, 3)] for o in options.outliers}
    cases["CLIP, natural"] = [natural(seed) for seed in (0, 1, 0)]
    print("| first token | largest value over the median token's | activations | | projections | denoiser |")
    print("|---|---|---|---|---|---|")
    for name, texts in cases.items():
        sizes = texts[0].abs().amax(-1)
        ratio = float((sizes[:, 0] / sizes.median(1).values).mean())
        for scheme, how, projections, output in rows(options.size, texts):
            print(f"| {name} | {ratio:.1f} | {scheme} | {how} | {projections:.1f} | {output:.1f} |", flush=True)


if __name__ == "__main__":
    main()
