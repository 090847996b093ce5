"""Cold cost: what the first call of a never-seen expression costs over its tenth.

    python -m benchmarks.cold [--count 200]

Random valid expressions; each is given as text, so that parsing, checking and lowering count. torch.compile needs
seconds for the same. Prints percentiles of (first call - median of calls 2..10), and the process's memory growth over
the second half of the expressions. Python's cyclic garbage collector is off meanwhile: a full collection takes 40 ms
with PyTorch loaded, whoever happens to trigger it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from random import Random

import torch

from benchmarks.memory import resident_bytes
from kernels import ExpressionError, fused_ffn
from kernels.language.expression import Expression, apply, linear
from kernels.language.expression import X as LEAF
from kernels.language.operators import BINARY, UNARY

HIDDEN, INNER, TOKENS = 540, 270, 128


def tree_over_x(rng: Random, depth: int) -> Expression:
    if depth == 0 or rng.random() < 0.4:
        return LEAF
    if rng.random() < 0.5:
        return apply(rng.choice(UNARY), tree_over_x(rng, depth - 1))
    return apply(rng.choice(BINARY), tree_over_x(rng, depth - 1), tree_over_x(rng, depth - 1))


def around(rng: Random, core: Expression) -> Expression:
    """Up to two operators around `core`."""
    for _ in range(rng.randrange(3)):
        if rng.random() < 0.5:
            core = apply(rng.choice(BINARY), core, tree_over_x(rng, 2))
        else:
            core = apply(rng.choice(UNARY), core)
    return core


def random_text(rng: Random) -> str:
    """The text of a body of the shape the search space has: one product inside the other."""
    first = linear(tree_over_x(rng, 2), "wb1")
    return str(around(rng, linear(around(rng, first), "wb2")))


def cold_costs(count: int, seed: int = 0) -> dict[str, float]:
    """Seconds: percentiles of the first call's excess over the following nine; bytes the process grew by."""
    rng = Random(seed)
    x = torch.randn(TOKENS, HIDDEN)
    weights = [torch.randn(INNER, HIDDEN) * 0.04, torch.zeros(INNER), torch.randn(HIDDEN, INNER) * 0.06]
    weights += [torch.zeros(HIDDEN), torch.ones(HIDDEN), torch.zeros(HIDDEN)]
    fused_ffn(x, *weights, "linear(relu(linear(x,wb1)),wb2)")  # the library is loaded
    gc.collect()
    gc.disable()
    try:
        return _measure(rng, x, weights, count)
    finally:
        gc.enable()


def _measure(rng: Random, x: torch.Tensor, weights: list[torch.Tensor], count: int) -> dict[str, float]:
    excess: list[float] = []
    seen: set[str] = set()
    half = 0
    while len(excess) < count:
        text = random_text(rng)
        if text in seen:
            continue
        seen.add(text)
        times = []
        try:
            for _ in range(10):
                start = time.perf_counter()
                fused_ffn(x, *weights, text)
                times.append(time.perf_counter() - start)
        except ExpressionError:
            continue  # not valid at these widths: the space would not propose it
        excess.append(times[0] - statistics.median(times[1:]))
        if len(excess) == count // 2:
            half = resident_bytes()
    grown = resident_bytes() - half
    excess.sort()
    at = lambda q: excess[min(count - 1, int(q * count))]  # noqa: E731
    return {"median": at(0.5), "p95": at(0.95), "max": excess[-1], "growth_bytes": grown, "count": count}


def report(costs: dict[str, float]) -> str:
    return (
        f"first call of {costs['count']:.0f} never-seen expressions over their later calls: median "
        f"{costs['median'] * 1e3:.1f} ms, 95 % {costs['p95'] * 1e3:.1f} ms, worst {costs['max'] * 1e3:.1f} ms; "
        f"memory over the second half: {costs['growth_bytes'] / 2**20:+.1f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=200, help="number of expressions")
    print(report(cold_costs(parser.parse_args().count)))


if __name__ == "__main__":
    main()
