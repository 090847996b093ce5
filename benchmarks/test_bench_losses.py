"""pytest-benchmark cases of losses and attention: `pytest benchmarks/test_bench_losses.py --benchmark-only`.

`python -m benchmarks.losses` has the same cases interleaved, with peak memory.
"""

import pytest

from benchmarks.losses_cases import DTYPES, LENGTHS, PARTS, SIDES, Case, runner


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses(benchmark, dtype, part, length, side):
    case = Case(dtype, length, part, layers=1)
    run = runner(case, side)
    run()
    benchmark.group = str(case)
    benchmark(run)
