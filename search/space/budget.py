"""The parameter budget: counting and drawing (stack, ratio) assignments that fit a window, exactly.

A layer's FFNs cost n (2 H d + d + 3 H) parameters, or less with Kronecker weights, so an assignment's total is a sum
over layers. `BudgetTable` keeps, for k = 0..L, the distinct sums the last k layers can reach and how many assignments
reach each; the number of ways to finish a partly chosen assignment inside the window is two binary searches. Drawing
layer after layer in proportion to those numbers is uniform over all assignments in the window (docs/decisions/0024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True)
class _Sums:
    """Distinct sums of k layers, ascending [m], and running numbers of assignments [m + 1], 0 first."""

    values: np.ndarray
    running: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray) -> _Sums:
        return cls(values, np.cumsum(np.concatenate([np.zeros(1, dtype=counts.dtype), counts])))

    def between(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """Number of assignments with low <= sum <= high, elementwise."""
        upto, below = np.searchsorted(self.values, high, side="right"), np.searchsorted(self.values, low, side="left")
        return self.running[upto] - self.running[below]


@lru_cache(maxsize=64)
def budget_table(
    costs: tuple[int, ...] | tuple[tuple[int, ...], ...], num_layers: int, low: int, high: int
) -> BudgetTable:
    """A `BudgetTable`, shared by the spaces of a search that have the same one."""
    return BudgetTable(costs, num_layers, low, high)


class BudgetTable:
    """Assignments of one of `costs` to each of `num_layers` layers whose sum lies in [low, high].

    Args:
        costs: parameters of each choice, positive: the same for all layers, or one such sequence per layer, all of one
            length.
        num_layers: L, at least 1.
        low, high: window of the sum of costs over all layers, both included.
    """

    def __init__(self, costs: Sequence[int] | Sequence[Sequence[int]], num_layers: int, low: int, high: int) -> None:
        rows = np.asarray(costs, dtype=np.int64)
        self.layers = np.broadcast_to(rows, (num_layers, rows.shape[-1]))
        self.num_layers, self.low, self.high = num_layers, low, high
        self.reachable = (int(self.layers.min(1).sum()), int(self.layers.max(1).sum()))
        fits_int64 = rows.shape[-1] ** num_layers < 2**62
        self._sums = self._build(np.int64 if fits_int64 else object)

    def _build(self, dtype: type) -> list[_Sums]:
        """For k = 0..L the sums of the last k layers."""
        cheapest, dearest = (np.concatenate([[0], np.cumsum(m)]) for m in (self.layers.min(1), self.layers.max(1)))
        values = np.zeros(1, dtype=np.int64)
        counts: np.ndarray = np.ones(1, dtype=dtype)
        tables = [_Sums.of(values, counts)]
        for first in range(self.num_layers - 1, -1, -1):
            sums = (values[None, :] + self.layers[first][:, None]).ravel()
            repeated = np.broadcast_to(counts, (self.layers.shape[1], len(counts))).ravel()
            keep = (sums >= self.low - dearest[first]) & (sums <= self.high - cheapest[first])
            values, counts = _merge(sums[keep], repeated[keep])
            tables.append(_Sums.of(values, counts))
        return tables

    def count(self, layers: int | None = None, spent: int = 0) -> int:
        """Number of assignments of the last `layers` layers (all, by default) that fit when `spent` is spent elsewhere.

        `spent` must be a sum that the other layers can have.
        """
        free = self.num_layers if layers is None else layers
        window = np.asarray([self.low - spent]), np.asarray([self.high - spent])
        return int(self._sums[free].between(*window)[0])

    def fits(self, choices: Sequence[int]) -> bool:
        """Whether an assignment (index into `costs` per layer) lies in the window."""
        return self.low <= int(self.layers[np.arange(self.num_layers), list(choices)].sum()) <= self.high

    def sample(self, rng: np.random.Generator, layers: int | None = None, spent: int = 0) -> list[int]:
        """Draws uniformly from the assignments that `count(layers, spent)` counts: one index into `costs` per layer.

        Raises:
            ValueError: there is none.
        """
        free = self.num_layers if layers is None else layers
        chosen: list[int] = []
        for rest in range(free - 1, -1, -1):
            costs = self.layers[self.num_layers - rest - 1]
            ways = self._sums[rest].between(self.low - spent - costs, self.high - spent - costs)
            running = np.cumsum(ways)
            total = int(running[-1]) if len(running) else 0
            if total == 0:
                raise ValueError(f"no assignment of {free} layers fits the window {self.low}..{self.high}")
            index = int(np.searchsorted(running, _below(rng, total), side="right"))
            chosen.append(index)
            spent += int(costs[index])
        return chosen

    def closest_to_uniform(self, index: int) -> list[int] | None:
        """An assignment in the window with as many layers as possible at choice `index`; None if the window is empty.

        The layers that must differ come last and take, one by one, the cost nearest to the one at `index` that can
        still be completed. Deterministic.
        """
        own = [0, *np.cumsum(self.layers[:, index]).tolist()]
        for kept in range(self.num_layers, -1, -1):
            if self.count(self.num_layers - kept, own[kept]):
                break
        else:
            return None
        chosen, spent = [index] * kept, own[kept]
        for rest in range(self.num_layers - kept - 1, -1, -1):
            costs = self.layers[self.num_layers - rest - 1]
            order = np.argsort(np.abs(costs - costs[index]), kind="stable")
            nearest = next(int(i) for i in order if self.count(rest, spent + int(costs[i])))
            chosen.append(nearest)
            spent += int(costs[nearest])
        return chosen

    def nearest_sums(self) -> tuple[int | None, int | None]:
        """The largest reachable sum below the window and the smallest above it (None where there is none)."""
        values = np.zeros(1, dtype=np.int64)
        for costs in self.layers:
            values = np.unique(values[None, :] + costs[:, None])
        below, above = values[values < self.low], values[values > self.high]
        return (int(below[-1]) if len(below) else None), (int(above[0]) if len(above) else None)


def _merge(sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct sums, ascending, and the total of their counts."""
    if not len(sums):
        return sums, counts
    order = np.argsort(sums, kind="stable")
    sums, counts = sums[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], sums[1:] != sums[:-1]]))
    return sums[starts], np.add.reduceat(counts, starts)


def _below(rng: np.random.Generator, bound: int) -> int:
    """A uniform integer in [0, bound), for a bound of any size."""
    if bound <= 2**63 - 1:
        return int(rng.integers(bound))
    bits = bound.bit_length()
    while True:
        value = int.from_bytes(rng.bytes((bits + 7) // 8), "little") & ((1 << bits) - 1)
        if value < bound:
            return value
