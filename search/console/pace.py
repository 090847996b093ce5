"""How fast a phase goes, and how long it still takes.

The time left is the work that remains divided by the work done per second since the phase's first report; what was
done before it (a resumed phase's part, kernels built, first steps that are slower) does not count. Work is counted in
units, or where units differ in what they cost, in those costs.

An estimate has to have evidence: it is given from `REPORTS` reports, `SECONDS` and `SHARE` of the phase's work after
the first report on. Rejected: showing whatever the first units say. They are the slowest, and the first numbers of a
phase of unequal units were ten times off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate

REPORTS = 3
SECONDS = 3.0
SHARE = 0.03

Costs = Sequence[float]
"""What every unit of a phase costs, in any measure, in order."""


class Pace:
    """Work per second since the first report.

    Args:
        total: units of the phase.
        costs: of the units; None where they cost the same.
        now: the clock, in seconds.
    """

    def __init__(self, total: int, costs: Costs | None = None, now: Callable[[], float] = time.monotonic) -> None:
        self.total, self.now = total, now
        self.began = now()
        self.done = 0
        self._work = None if costs is None else [0.0, *accumulate(costs)]
        self._first: tuple[int, float] | None = None
        self._last = self.began
        self._reports = 0

    def take(self, done: int, total: int) -> None:
        """`done` of `total` units are finished; nothing new where `done` has not grown."""
        self.total = total
        at = self.now()
        if self._first is None or done < self._first[0]:
            self._first, self._reports = (done, at), 0
        elif done > self.done:
            self._reports += 1
        self.done, self._last = done, at

    @property
    def rate(self) -> float:
        """Units per second; before there is a second report those since the beginning."""
        if self._first is None:
            return 0.0
        units, seconds = self.done - self._first[0], self._last - self._first[1]
        if units == 0:
            units, seconds = self.done, self._last - self.began
        return units / max(seconds, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds the rest takes, counted from now; None as long as there is too little evidence, or no end."""
        if self._first is None or self._reports < REPORTS or self.done >= self.total:
            return None
        first, began = self._first
        seconds, done = self._last - began, self._of(self.done) - self._of(first)
        if seconds < SECONDS or done < SHARE * self._of(self.total):
            return None
        rest = (self._of(self.total) - self._of(self.done)) * seconds / done
        return max(0.0, rest - (self.now() - self._last))

    def _of(self, units: int) -> float:
        """Work of the first `units` units."""
        if self._work is None:
            return float(units)
        known = len(self._work) - 1
        return self._work[min(units, known)] + max(0, units - known) * self._work[-1] / max(known, 1)


def in_words(seconds: float) -> str:
    """`0:07`, `12:30` or `3:02:10`."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
