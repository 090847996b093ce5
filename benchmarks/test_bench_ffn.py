"""pytest-benchmark cases of the FFN op: `pytest benchmarks/ --benchmark-only`, narrowed with `-k "bf16 and fwd-"`.

One expression at every shape; `python -m benchmarks.compare` has all six, interleaved, with the floor.
"""

from random import Random

import pytest

from benchmarks.cold import random_text
from benchmarks.ffn_cases import INNER, RELEASED, SIDES, TOKENS, Case, runner
from kernels.language.lowering import lower


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ffn(benchmark, dtype, inner, tokens, direction, side):
    case = Case(RELEASED[0], dtype, inner, tokens, direction == "fwd+bwd")
    run = runner(case, side)
    run()  # compiles where the side compiles
    benchmark.group = f"{dtype} {direction} T={tokens} d={inner}"
    benchmark(run)


def test_cold_expression(benchmark):
    """Text to program of expressions never seen before: all that a new candidate costs before it runs."""
    rng = Random(0)
    texts = {random_text(rng) for _ in range(400)}
    benchmark.pedantic(lower, setup=lambda: ((texts.pop(), "truncate"), {}), rounds=200)
