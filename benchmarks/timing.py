"""Interleaved timing: ratios are taken between sides that ran in turns, so that drift and noise hit all alike.

Each round runs every side once, in an order that alternates; a side's run repeats its function often enough to last
`SLICE` seconds. Reported are medians over rounds; where the middle half of every side's rounds already lies within
`STEADY` of its median after five rounds, no more are run. Rejected: one side after the other, which measures the
machine's mood.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

SLICE = 0.01
"""Shortest timed stretch, in seconds; the clock and a call's overhead vanish beside it."""

STEADY = 0.04
"""Spread of the middle half of a side's times, relative to their median, that needs no further rounds."""
_FEWEST_ROUNDS = 5


def _is_steady(times: list[float]) -> bool:
    low, middle, high = statistics.quantiles(times, n=4)
    return high - low <= STEADY * middle


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call of every side, over at most `rounds` rounds."""
    repeats = {}
    for name, run in sides.items():
        run()
        run()  # the second call is warm
        start = time.perf_counter()
        run()
        repeats[name] = max(1, round(SLICE / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        for name in order:
            run = sides[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
        order.reverse()
        if len(times[order[0]]) >= _FEWEST_ROUNDS and all(_is_steady(values) for values in times.values()):
            break
    return {name: statistics.median(values) for name, values in times.items()}
