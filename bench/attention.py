"""Block-sparse attention against dense attention: one call of each in turn, and how near it comes to the bound.

    python bench/attention.py --tokens 4096 16384 --densities 0.25 0.125 --repeats 15  # the table of docs/attention.md
    python bench/attention.py --tokens 4096 --paths cpp blocks flex dense --block-size 128
    python bench/attention.py --cpu-time --threads 1      # on a machine that others use too

The bound is what leaving blocks out can gain at most, 1 / density; the share of it that is reached counts everything,
reordering included. Random blocks for each head and a random order for each head are the hardest case: nothing lies
side by side. Tables are markdown.
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
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}, "
        f"batch {args.batch}, {args.heads} heads of {args.head_size}, blocks of {args.block_size}, "
        f"{args.pattern} masks, {'a random order for each head' if args.reorder else 'tokens in their own order'}; "
        f"median {'CPU ' if args.cpu_time else ''}time of {args.repeats} calls in turn\n"
    )
    print("| tokens | density | path | dense ms | sparse ms | gain | share of the bound | error |")
    print("|--:|--:|---|--:|--:|--:|--:|--:|")
    for tokens in args.tokens:
        # As diffusers gives them: [B, N, H, D] seen as [B, H, N, D].
        shape = (args.batch, tokens, args.heads, args.head_size)
        q, k, v = (torch.randn(shape, device=args.device, dtype=dtype).transpose(1, 2) for _ in range(3))
        for density in args.densities:
            pattern = make_pattern(args, tokens, density)
            dense = partial(F.scaled_dot_product_attention, q, k, v)
            exact = some_rows(q, k, v, pattern)
            for path in args.paths:
                asked = None if path == "auto" else path
                sparse = partial(block_sparse_attention, q, k, v, pattern, path=asked)
                error = (rows_of(sparse(), pattern) - exact).abs().max().item()
                dense_ms, sparse_ms = medians([dense, sparse], args.repeats, args.device, clock)
                gain = dense_ms / sparse_ms
                taken = path_for(q, k, v, pattern, path=asked)
                print(
                    f"| {tokens} | {pattern.density:.3f} | {taken} | {dense_ms:.1f} | {sparse_ms:.1f} | {gain:.2f}x "
                    f"| {gain * pattern.density:.0%} | {error:.1e} |",
                    flush=True,
                )


def make_pattern(args: argparse.Namespace, tokens: int, density: float) -> BlockPattern:
    """Window over a square image (a line if tokens is no square) or over 4 frames, or random blocks for each head."""
    side = int(tokens**0.5)
    grid: tuple[int, ...] = (side, side) if side * side == tokens else (tokens,)
    if args.pattern == "video":
        side = int((tokens / 4) ** 0.5)
        grid = (4, side, tokens // 4 // side)
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(args.heads, tokens, generator=generator).argsort(-1) if args.reorder else None
    if args.pattern == "random":
        n = -(-tokens // args.block_size)
        score = torch.rand(args.heads, n, n, generator=generator)
        mask = score.argsort(dim=-1).argsort(dim=-1) < max(round(density * n), 1)
    else:
        mask = window_blocks(grid, density=density, block_size=args.block_size)
    return BlockPattern.from_mask(mask, args.block_size, order).to(args.device)


def rows_of(out: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """The last block of queries of each head, in the pattern's order."""
    last = range((pattern.keep.shape[1] - 1) * pattern.block_size, out.shape[2])
    if pattern.order is None:
        return out[:, :, last]
    index = pattern.order[:, last].long()[None, :, :, None].expand(len(out), out.shape[1], -1, out.shape[3])
    return out.gather(2, index)


def some_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: BlockPattern) -> torch.Tensor:
    """What they should be, without N x N scores."""
    tokens = q.shape[2]
    keep = pattern.keep[:, -1].repeat_interleave(pattern.block_size, 1)[:, :tokens]  # [H or 1, N]
    if pattern.order is not None:  # back to the tokens' own places
        keep = torch.zeros_like(keep.expand(q.shape[1], -1)).scatter(
            1, pattern.order.long(), keep.expand(q.shape[1], -1)
        )
    return F.scaled_dot_product_attention(rows_of(q, pattern), k, v, attn_mask=keep[None, :, None])


def medians(
    calls: list[Callable[[], torch.Tensor]], repeats: int, device: str, clock: Callable[[], float]
) -> list[float]:
    """Median milliseconds of each call, measured in turn so that a busy moment hits all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = clock()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:
                taken.append(clock() - start)
    return [1e3 * statistics.median(taken) for taken in seconds]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="kept fraction")
    parser.add_argument("--pattern", choices=["window", "video", "random"], default="random")
    parser.add_argument("--reorder", action=argparse.BooleanOptionalAction, default=True, help="an order for each head")
    parser.add_argument("--paths", nargs="+", choices=["auto", *PATHS], default=["auto"])
    parser.add_argument("--block-size", type=int, default=64, help="tokens in a block")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; one is the least disturbed by other programs")
    parser.add_argument("--cpu-time", action="store_true", help="time spent computing, not waiting for the processor")
    parser.add_argument("--repeats", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
