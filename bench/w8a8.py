"""Quantized linears on a PixArt-sized denoiser with random weights: time, bytes and memory, with float32 beside them.

    python bench/w8a8.py                   # all rows
    python bench/w8a8.py --rows speed      # only the times, with and without VNNI

Each row runs in a process of its own. Times are medians of interleaved runs, p20 and p80 beside them; on a machine that
others use too, read the ratio of processor time, taken with --threads 1. Memory is the anonymous resident memory of
the process (Linux only), in the row "disk" with Python and torch, in the others without. The row "AVX2" limits the
libraries to what a processor without AVX-512 and VNNI has.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def build(blocks):
    import torch
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=1152,
        sample_size=64,
        patch_size=2,
        caption_channels=4096,
    )
    return model.eval().requires_grad_(False)


def inputs():
    import torch

    return {
        "hidden_states": torch.randn(1, 4, 64, 64),  # 1024 tokens
        "encoder_hidden_states": torch.randn(1, 120, 4096),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def anonymous():
    """Bytes of anonymous resident memory, after giving back what is free."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def weight_bytes(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def plan(model=None, **settings):
    """Quantize's defaults, or other settings; where they need calibration, ``model`` is called once for it."""
    import torch

    from diffaccel import Plan, Quantize
    from diffaccel.denoiser import Denoiser
    from diffaccel.plan import Artefacts
    from diffaccel.quantization.calibrate import recorders_of

    section = Quantize(**settings)
    if not section.needs_calibration:
        return Plan(quantization=[section])
    (recorder,) = recorders_of([section], [Denoiser.of(model, "transformer")]).values()
    with torch.no_grad():
        model(**inputs())
    recorder.remove()
    return Plan(quantization=[section], artefacts=Artefacts(dict(recorder.artefacts())))


def speed(args, **settings):
    """Denoiser calls, float32 and quantized in turn."""
    import torch

    import diffaccel
    from diffaccel.denoiser import Denoiser
    from diffaccel.quantization.worth import worth_it

    torch.set_num_threads(args.threads)
    reference = build(args.blocks)
    model = copy.deepcopy(reference)
    feed = inputs()
    with torch.inference_mode():
        accel = diffaccel.accelerate(model, plan(model, **settings))
        expected, got = reference(**feed)[0], model(**feed)[0]
        times = {"float32": [], "quantized": []}
        processor = {"float32": [], "quantized": []}
        for _ in range(args.repeats):
            for name, net in (("float32", reference), ("quantized", model)):
                start, busy = time.perf_counter(), time.process_time()
                net(**feed)
                times[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - busy)
    sqnr = 10 * torch.log10(expected.double().square().sum() / (expected - got).double().square().sum()).item()
    facts = accel.report().techniques[0].facts
    quantiles = {name: [round(q, 4) for q in statistics.quantiles(t, n=10)[1::3]] for name, t in times.items()}
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "speedup": medians["float32"] / medians["quantized"],
        "speedup_processor_time": statistics.median(processor["float32"]) / statistics.median(processor["quantized"]),
        "seconds": medians,
        "p20_p50_p80": quantiles,
        "sqnr_db": sqnr,
        "activation_bits": facts["activation_bits"],
        "weights_ratio": facts["bytes_after"] / facts["bytes_before"],
        "kernels": facts["kernels"],
        "worth_it": worth_it(Denoiser.of(reference, "transformer")),
    }


def bake(args):
    """Bytes and memory of the whole denoiser after bake(), and of one loaded from its save."""
    import diffaccel

    build(1)  # imports
    start = anonymous()
    model = build(args.memory_blocks)
    full, full_memory = weight_bytes(model), anonymous()
    accel = diffaccel.accelerate(model, plan())
    attached = anonymous()
    accel.bake()
    memory = anonymous()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = sum(f.stat().st_size for f in os.scandir(folder))
        after = weight_bytes(model)
        del model, accel
        between = anonymous()
        from diffusers import PixArtTransformer2DModel

        model = PixArtTransformer2DModel.from_pretrained(folder)
        loaded = anonymous()
        del model
    return {
        "bytes_ratio": after / full,
        "saved_ratio": saved / full,
        "memory_ratio": (memory - start) / (full_memory - start),
        "memory_ratio_attached_originals_cpu": (attached - start) / (full_memory - start),
        "loaded_ratio": (loaded - between) / full,
        "float32_bytes": full,
        "process_without_model": start,
    }


def disk(args):
    """Memory while attached with the originals on disk."""
    import torch

    import diffaccel

    model = build(args.memory_blocks)
    first = model.transformer_blocks[0].ff.net[2].weight.clone()
    before = anonymous()
    accel = diffaccel.accelerate(model, plan(), originals="disk")
    attached = anonymous()
    accel.remove()
    return {
        "memory_ratio": attached / before,
        "memory_ratio_removed": anonymous() / before,
        "restored": torch.equal(first, model.transformer_blocks[0].ff.net[2].weight),
        "float32_memory": before,
    }


# name, function, environment, what it must reach: fact -> (comparison, value)
ROWS = {
    "speed": (speed, {}, {"speedup": (">=", 1.3), "weights_ratio": ("<=", 0.26)}),
    "speed AVX2": (speed, AVX2, {"speedup": (">=", 1.3)}),
    "speed rotated": (partial(speed, rotate=True), {}, {"speedup": (">=", 1.35)}),
    "speed conditioned": (partial(speed, balance=0.5, rotate=True), {}, {"speedup": (">=", 1.35)}),
    "speed static": (partial(speed, activations="static", balance=0.5), {}, {"speedup": (">=", 1.35)}),
    "speed W4A8": (partial(speed, weights="int4", group=64), {}, {"weights_ratio": ("<=", 0.15)}),
    "bake": (bake, {}, {"bytes_ratio": ("<=", 0.30), "memory_ratio": ("<=", 0.30)}),
    "disk": (disk, {}, {"memory_ratio": ("<=", 0.5)}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help=f"prefixes of: {', '.join(ROWS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=8, help="of the timed denoiser")
    parser.add_argument("--memory-blocks", type=int, default=28, help="of the weighed denoiser")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        warnings.simplefilter("ignore")
        print("RESULT" + json.dumps(ROWS[args.one][0](args)))
        return
    results = {}
    for name, (_, environment, bars) in ROWS.items():
        if not any(name.startswith(row) for row in args.rows):
            continue
        command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
        run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
        line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
        if line is None:
            sys.exit(f"row {name} failed:\n{run.stderr}")
        results[name] = json.loads(line.removeprefix("RESULT"))
        if not args.json:
            print(f"\n{name}")
            for fact, value in results[name].items():
                bar = bars.get(fact)
                met = "" if bar is None else f"  (bar {bar[0]} {bar[1]}: {'met' if _holds(value, *bar) else 'MISSED'})"
                print(f"  {fact:36} {value if not isinstance(value, float) else f'{value:.3f}'}{met}", flush=True)
    if args.json:
        print(json.dumps(results, indent=2))


def _holds(value, sign, bound):
    return value >= bound if sign == ">=" else value <= bound


if __name__ == "__main__":
    main()
