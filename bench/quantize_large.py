"""Quantizing a PixArt-Sigma denoiser of 600 M random parameters, and loading what was saved: time and peak memory.

    python bench/quantize_large.py                       # all: some 10 minutes, 8 GB of memory, 1 GB of disk
    python bench/quantize_large.py --blocks 2 --rows W8  # a small one; rows by prefix

Each row runs in a process of its own. Peak memory is that of resident pages, anonymous and of files (for the rows that
load: of the checkpoint's files), over what the process had when it began: with the model in memory for the rows that
quantize, with everything imported and a tiny model loaded once for those that load. Linux only. What is done is kept in
--folder, where a second call goes on.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

WIDTH = 1152
TEXT, TEXT_WIDTH = 120, 4096
# Settings of `diffaccel.quantize`; those of the calibrated rows take what a checkpoint of 4 bits has in practice.
W8A8 = {}
W4A8 = {"weights": "int4", "group": 64}
CALIBRATED = {**W4A8, "balance": 0.5, "rotate": True, "low_rank": 32}


def build(blocks, heads=16):
    import torch
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    width = heads * (WIDTH // 16)
    model = PixArtTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=4,
        out_channels=8,
        num_layers=blocks,
        cross_attention_dim=width,
        sample_size=32,
        patch_size=2,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def pipeline(model):
    """Around ``model``; called with random text embeddings and for latents, so that it needs no other network."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline

    scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction", beta_start=0.00085, beta_end=0.012)
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=vae.to(torch.float32), transformer=model, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def requests(count):
    import torch

    mask = torch.ones(1, TEXT, dtype=torch.long)
    texts = [torch.randn(1, TEXT, TEXT_WIDTH, generator=torch.Generator().manual_seed(i)) for i in range(count + 1)]
    names = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
    return [
        {"negative_prompt": None} | dict(zip(names, (text, texts[-1], mask, mask), strict=True)) for text in texts[:-1]
    ]


def status(field):
    """Bytes, of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def settle():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """Resident bytes at the highest since this was made, over those at that time."""

    def __init__(self):
        settle()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._before = status("VmRSS")

    def bytes(self):
        return status("VmHWM") - self._before


class Sampled:
    """Anonymous bytes over those at the beginning, plus resident pages of the files in ``folder``; the highest seen.

    Unlike `Peak`, pages of libraries that come and go do not count: they are as large as the checkpoint of a test.
    """

    def __init__(self, folder):
        settle()
        self._folder, self._before, self._most = str(folder.resolve()), status("RssAnon"), 0
        self._going = True
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._going = False
        self._thread.join()

    def _run(self):
        while self._going:
            self.sample()
            time.sleep(0.002)

    def sample(self):
        """Look now; gives the highest so far."""
        self._most = max(self._most, status("RssAnon") - self._before + self._pages())
        return self._most

    def _pages(self):
        total, ours = 0, False
        with open("/proc/self/smaps") as file:
            for line in file:
                if line[0] in "0123456789abcdef":  # a mapping; what follows is about it
                    ours = self._folder in line
                elif ours and line.startswith("Rss:"):
                    total += int(line.split()[1]) * 1024
        return total


def timed(model, args, *, calibrated, **settings):
    import torch

    import diffaccel

    torch.set_num_threads(args.threads)
    target = pipeline(model) if calibrated else model
    call = {"num_inference_steps": args.steps, "height": 256, "width": 256, "output_type": "latent"}
    more = {"prompts": requests(args.prompts), "call": {**call, "use_resolution_binning": False}} if calibrated else {}
    peak, start = Peak(), time.perf_counter()
    diffaccel.quantize(target, **settings, **more)
    return {"seconds": time.perf_counter() - start, "peak GB beyond the model": peak.bytes() / 1e9}


def quantize(args, **settings):
    """One row: the time of a first use of torch's kernels is not in it, that of choosing among ours is."""
    calibrated = "balance" in settings
    timed(build(1, heads=2), args, calibrated=calibrated, **settings)
    model = build(args.blocks)
    return {"parameters M": sum(p.numel() for p in model.parameters()) / 1e6} | timed(
        model, args, calibrated=calibrated, **settings
    )


def save(folder, blocks, **options):
    import diffaccel

    model = build(blocks)
    diffaccel.quantize(model, **W4A8, bake=True)
    model.save_pretrained(folder, **options)


def load(args, **options):
    """A checkpoint of 4-bit weights: peak over the size of its files, once every page of every tensor was read."""
    import torch
    from diffusers import PixArtTransformer2DModel

    from diffaccel.quantization.layer import QuantizedLayer

    torch.set_num_threads(args.threads)
    name = f"{args.blocks} blocks{', sharded' if options else ''}"
    folder = Path(args.folder) / name
    if not (folder / "config.json").exists():
        command = [sys.executable, __file__, "--blocks", str(args.blocks), "--save", str(folder), json.dumps(options)]
        subprocess.run(command, check=True, capture_output=True)
    with tempfile.TemporaryDirectory() as tiny:
        model = build(1, heads=2)
        import diffaccel

        diffaccel.quantize(model, **W4A8, bake=True)
        model.save_pretrained(tiny)
        PixArtTransformer2DModel.from_pretrained(tiny)
        del model
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    start = time.perf_counter()
    with Sampled(folder) as peak:
        model = PixArtTransformer2DModel.from_pretrained(folder)
        facts = {"seconds": time.perf_counter() - start, "files": len(list(folder.glob("*.safetensors")))}
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:  # a mapped file has no pages until then
            tensor.detach().flatten().view(torch.uint8).amax()  # which needs no memory of its own
        facts |= {"file MB": size / 1e6, "peak / file": peak.sample() / size}
    packed = [m for m in model.modules() if isinstance(m, QuantizedLayer)]
    before = sum(tensor.nbytes for tensor in tensors)
    with torch.no_grad():
        model(
            torch.randn(1, 4, 32, 32),
            torch.randn(1, TEXT, TEXT_WIDTH),
            torch.tensor([500]),
            {"resolution": None, "aspect_ratio": None},
        )
    after = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    return facts | {"packed layers": len(packed), "tensors / file": max(before, after) / size}


# name, function, its settings, what it must reach at full size: fact -> most
ROWS = {
    "W8A8": (quantize, W8A8, {"seconds": 60, "peak GB beyond the model": 6}),
    "W4A8 g64": (quantize, W4A8, {"seconds": 60, "peak GB beyond the model": 6}),
    "W4A8 g64, calibrated, balance, rotation, rank 32": (
        quantize,
        CALIBRATED,
        {"seconds": 300, "peak GB beyond the model": 6},
    ),
    "load": (load, {}, {"peak / file": 1.3, "tensors / file": 1.02}),
    "load sharded": (load, {"max_shard_size": "50MB"}, {"peak / file": 1.3, "tensors / file": 1.02}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help=f"prefixes of: {'; '.join(ROWS)}")
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompts", type=int, default=4, help="of the calibrated row")
    parser.add_argument("--steps", type=int, default=4, help="of the calibrated row")
    parser.add_argument("--folder", default="out/quantize_large")
    parser.add_argument("--again", action="store_true", help="run rows again that are done")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--save", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.save:
        save(args.save[0], args.blocks, **json.loads(args.save[1]))
        return
    if args.one:
        function, settings, _ = ROWS[args.one]
        print("RESULT" + json.dumps(function(args, **settings)))
        return
    results = {name: row(name, args) for name in ROWS if any(name.startswith(prefix) for prefix in args.rows)}
    print(f"\n| {args.blocks} blocks | measured | most |\n|---|---|---|")
    for name, facts in results.items():
        bars = ROWS[name][2]
        shown = ", ".join(f"{fact} {value:.4g}" for fact, value in facts.items())
        met = ", ".join(f"{fact} {bar}: {'met' if facts[fact] <= bar else 'MISSED'}" for fact, bar in bars.items())
        print(f"| {name} | {shown} | {met} |")


def row(name, args):
    """Its facts, measured in a process of its own or read from the folder."""
    file = Path(args.folder) / "results.json"
    done = json.loads(file.read_text()) if file.exists() else {}
    key = json.dumps([name, args.blocks, args.threads, args.prompts, args.steps])
    if key not in done or args.again:
        print(f"{name} ...", file=sys.stderr, flush=True)
        options = [f"--{n}={getattr(args, n)}" for n in ("blocks", "threads", "prompts", "steps", "folder")]
        run = subprocess.run([sys.executable, __file__, *options, "--one", name], capture_output=True, text=True)
        line = next((line for line in run.stdout.splitlines() if line.startswith("RESULT")), None)
        if line is None:
            sys.exit(f"row {name} failed:\n{run.stderr}")
        done = (json.loads(file.read_text()) if file.exists() else {}) | {key: json.loads(line.removeprefix("RESULT"))}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(done, indent=2))
    return done[key]


if __name__ == "__main__":
    main()
