"""A wide video denoiser with random weights, sparse against dense: seconds of a whole call, and memory of calibration.

    python bench/attention_end_to_end.py                                     # 16,384 tokens, 6 blocks, density 0.2
    python bench/attention_end_to_end.py --grid 32 32 32 --calibrate-only    # peak memory of a calibration at 32,768
    python bench/attention_end_to_end.py --grid 8 16 16 --layers 2 --cpu-time --repeats 1    # to try it out

Each head reads the tokens in an order of its own and has a mask of its own, from a calibration on the denoiser itself.
"""

import argparse
import resource
import statistics
import time

import torch
from diffusers import WanTransformer3DModel

from diffaccel import BlockSparse, Plan, accelerate
from diffaccel.attention.calibrate import calibrate_section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=[16, 32, 32], help="tokens: frames, height, width")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true", help="time spent computing, not waiting for the processor")
    parser.add_argument("--calibrate-only", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    frames, height, width = options.grid
    model = WanTransformer3DModel(
        num_attention_heads=options.heads,
        attention_head_dim=64,
        num_layers=options.layers,
        ffn_dim=4 * 64 * options.heads,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        rope_max_seq_len=max(128, height, width),
    ).eval()
    arguments = dict(
        hidden_states=torch.randn(1, 16, frames, 2 * height, 2 * width),
        timestep=torch.tensor([500]),
        encoder_hidden_states=torch.randn(1, 32, 64),
    )

    def call() -> None:
        with torch.no_grad():
            model(**arguments)

    section = BlockSparse(
        density=options.density, block_size=options.block_size, reorder=True, masks=1, steps=(0.0, 1.0)
    )
    call()
    before, started = _peak(), time.perf_counter()
    with accelerate(model, Plan()) as accel:
        # The first call teaches the layouts; the clock stands still, so that one pass is one call.
        call_twice = lambda: (call(), call())  # noqa: E731
        artefacts = calibrate_section(0, section, accel._context, call_twice, call)
    print(
        f"{frames * height * width} tokens, {options.layers} blocks of {options.heads} heads of 64, "
        f"{torch.get_num_threads()} threads: calibrated in {time.perf_counter() - started:.0f} s, peak memory "
        f"{(_peak() - before) / 2**20:.2f} GiB above that of a dense call"
    )
    if options.calibrate_only:
        return
    dense = [_seconds(call, options.cpu_time) for _ in range(options.repeats)]
    with accelerate(model, Plan(attention=section, artefacts=artefacts)) as accel:
        call()
        sparse = [_seconds(call, options.cpu_time) for _ in range(options.repeats)]
        print(accel.report())
    with accelerate(model, Plan(attention=BlockSparse(density=1.0, steps=(0.0, 1.0)))):
        call()
        whole = [_seconds(call, options.cpu_time) for _ in range(options.repeats)]
    d, s, w = (statistics.median(x) for x in (dense, sparse, whole))
    print("| dense s | sparse s | gain | planned at density 1 costs |\n|--:|--:|--:|--:|")
    print(f"| {d:.2f} | {s:.2f} | {d / s:.2f}x | {w / d - 1:+.1%} |")


def _seconds(call, cpu_time: bool) -> float:
    clock = time.process_time if cpu_time else time.perf_counter
    started = clock()
    call()
    return clock() - started


def _peak() -> int:
    """KiB that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
