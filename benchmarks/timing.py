"""Interleaved timing: ratios are taken between sides that ran in turns, so that drift and noise hit all alike.

Each round runs every side once, in an order that alternates; a side's run repeats its function often enough to last
`SLICE` seconds. Reported are medians over rounds. Rejected: one side after the other, which measures the machine's
mood.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

SLICE = 0.01
"""Shortest timed stretch, in seconds; the clock and a call's overhead vanish beside it."""


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds per call of every side, over `rounds` rounds."""
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
    return {name: statistics.median(values) for name, values in times.items()}
