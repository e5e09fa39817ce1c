"""Block-sparse attention against dense attention: one call of each in turn, and how near it comes to the bound.

    python bench/attention.py --tokens 4096 16384 --densities 0.25 0.125 --repeats 15  # the table of docs/attention.md
    python bench/attention.py --tokens 4096 --paths cpp blocks flex dense --block-size 128
    python bench/attention.py --cpu-time --threads 1      # on a machine that others use too

The same as ``diffaccel bench attention``, with more to choose.
"""

import argparse

import torch

from diffaccel.cli.bench import table
from diffaccel.kernels.attention_bench import Setting
from diffaccel.kernels.block_sparse import PATHS


def main() -> None:
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
    options = vars(parser.parse_args())
    if threads := options.pop("threads"):
        torch.set_num_threads(threads)
    options["dtype"] = getattr(torch, options["dtype"])
    for line in table(Setting(**options)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
