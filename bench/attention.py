"""Block-sparse attention against dense attention: milliseconds per call, dense and sparse measured in turn.

python bench/attention.py
python bench/attention.py --tokens 4096 --pattern random --block-size 128 --paths blocks flex
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from diffaccel.kernels.block_sparse import PATHS, BlockPattern, block_sparse_attention, path_for
from diffaccel.kernels.window_mask import window_blocks


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}, "
        f"batch {args.batch}, {args.heads} heads of {args.head_size}, blocks of {args.block_size}, "
        f"{args.pattern} masks; median of {args.repeats} interleaved calls"
    )
    print(f"{'tokens':>7} {'density':>8} {'dense ms':>9} {'sparse ms':>10} {'speed-up':>9} {'error':>8}  path")
    for tokens in args.tokens:
        # As diffusers gives them: [B, N, H, D] seen as [B, H, N, D].
        shape = (args.batch, tokens, args.heads, args.head_size)
        q, k, v = (torch.randn(shape, device=args.device, dtype=dtype).transpose(1, 2) for _ in range(3))
        for density in args.densities:
            pattern = make_pattern(args, tokens, density)
            mask = pattern.keep.repeat_interleave(args.block_size, 1).repeat_interleave(args.block_size, 2)
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, :, :tokens, :tokens])
            dense = partial(F.scaled_dot_product_attention, q, k, v)
            for path in args.paths:
                asked = None if path == "auto" else path
                sparse = partial(block_sparse_attention, q, k, v, pattern, path=asked)
                error = (sparse() - expected).abs().max().item()
                dense_ms, sparse_ms = medians([dense, sparse], args.repeats, args.device)
                print(
                    f"{tokens:7d} {pattern.density:8.3f} {dense_ms:9.1f} {sparse_ms:10.1f} "
                    f"{dense_ms / sparse_ms:8.2f}x {error:8.1e}  {path_for(q, k, v, pattern, path=asked)}",
                    flush=True,
                )


def make_pattern(args: argparse.Namespace, tokens: int, density: float) -> BlockPattern:
    """Window over a square image (a line if tokens is no square) or over 4 frames, or random blocks for each head."""
    side = int(tokens**0.5)
    grid: tuple[int, ...] = (side, side) if side * side == tokens else (tokens,)
    if args.pattern == "video":
        side = int((tokens / 4) ** 0.5)
        grid = (4, side, tokens // 4 // side)
    if args.pattern == "random":
        n = -(-tokens // args.block_size)
        score = torch.rand(args.heads, n, n, generator=torch.Generator().manual_seed(0))
        order = score.argsort(dim=-1).argsort(dim=-1)
        return BlockPattern.from_mask(order < max(round(density * n), 1), args.block_size).to(args.device)
    mask = window_blocks(grid, density=density, block_size=args.block_size)
    return BlockPattern.from_mask(mask, args.block_size).to(args.device)


def medians(calls: list[Callable[[], torch.Tensor]], repeats: int, device: str) -> list[float]:
    """Median milliseconds of each call, measured in turn so that a busy moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken) for taken in seconds]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="kept fraction")
    parser.add_argument("--pattern", choices=["window", "video", "random"], default="window")
    parser.add_argument("--paths", nargs="+", choices=["auto", *PATHS], default=["auto"])
    parser.add_argument("--block-size", type=int, default=64, help="tokens in a block")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; one is the least disturbed by other programs")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
