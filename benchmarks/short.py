"""Short inference calls: one FFN on few tokens, packing its weights in every call or keeping them packed.

    python -m benchmarks.short [--tokens 16 64 128] [--rounds 15]       two minutes
    OMP_NUM_THREADS=1 python -m benchmarks.short                        one thread

Prints, per dtype and number of tokens, eager PyTorch's time over that of both, and what keeping gains: geometric means
over d, smallest and largest in brackets. Times are medians of interleaved rounds (`benchmarks.timing`).
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.compare import geometric_mean
from benchmarks.environment import describe
from benchmarks.ffn_cases import INNER, RELEASED, Case, runner
from benchmarks.timing import interleaved

SIDES = ("eager", "ffnas", "kept")


def ratios(times: list[dict[str, float]], over: str, under: str) -> str:
    """`over` / `under` of all cases in a few words."""
    values = [t[over] / t[under] for t in times]
    return f"{geometric_mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.short", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512, 1024])
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    machine = describe()
    print(f"{machine['processor']}, {torch.get_num_threads()} threads, torch {machine['torch']}, H = 540")
    print("| | tokens | eager / packed in every call | eager / kept | packed in every call / kept |")
    print("|---|---|---|---|---|")
    for dtype in args.dtypes:
        for tokens in args.tokens:
            times = []
            for inner in INNER:
                case = Case(RELEASED[0], dtype, inner, tokens, backward=False)
                times.append(interleaved({side: runner(case, side) for side in SIDES}, args.rounds))
            columns = [ratios(times, *pair) for pair in (("eager", "ffnas"), ("eager", "kept"), ("ffnas", "kept"))]
            print("|", " | ".join((dtype, str(tokens), *columns)), "|", flush=True)


if __name__ == "__main__":
    main()
