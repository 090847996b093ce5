"""Limits on what an architecture may cost beside its parameters, and drawing (stack, ratio) inside all of them.

FLOPs and latency are sums over layers, peak memory is a maximum, so a memory limit only takes choices away from layers.
`LimitedTable` draws assignments inside the parameter window and under any number of such sums, uniformly:

    first      draws from the exact table of the window (`search.space.budget`) that happen to lie under the limits
    otherwise  from a grid: every sum is counted in coarse units, rounded down, so that the grid holds every assignment
               that fits and few others; one pass backwards over the layers counts completions, and what is drawn in
               proportion to them is kept if it really fits

Both keep a uniform draw only if it fits, so both are uniform over what fits. Costs may differ from layer to layer, as
latency does where expressions are fixed.

Rejected: exact sums in several dimensions. Their number grows beyond memory at 12 layers. Rejected: rejection alone; a
window that holds one assignment in a million would cost a million draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from engine.architecture import Architecture, LayerSpec
from engine.flops import ffn_flops, fixed_flops
from engine.memory import MIB, fixed_live, layer_live
from engine.params import inner_width
from kernels.expression import Expression
from search.costs import Costs, text
from search.space.budget import BudgetTable

QUICK_DRAWS = 48
GRID_DRAWS = 400
CELLS = 1 << 18
"""Cells of the grid, about."""

NAMES = ("flops", "memory_mb", "latency_ms")


@dataclass(frozen=True)
class Limits:
    """The most an architecture may cost; None is no limit.

    Attributes:
        costs: of architectures of this student.
        flops, memory_mb, latency_ms: limits, see `search.costs`.
    """

    costs: Costs
    flops: float | None = None
    memory_mb: float | None = None
    latency_ms: float | None = None

    @property
    def active(self) -> dict[str, float]:
        """Limits that are set, by name."""
        return {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}

    def violation(self, arch: Architecture) -> str | None:
        """The first limit `arch` exceeds, in one line; None if it keeps them all."""
        for name, most in self.active.items():
            value = self.costs.cost(name, arch)
            if value > most:
                return f"{text(name, value)} are more than budget.{name} {text(name, most)}"
        return None

    def of_layers(
        self, expressions: Sequence[Expression], shapes: Sequence[tuple[int, Fraction]]
    ) -> tuple[np.ndarray, list[np.ndarray], list[float], list[str]]:
        """What each (stack, ratio) would cost each layer with these expressions.

        Returns:
            Whether memory allows it, bool [L, C]; for every other limit that is set its costs, float64 [L, C], what
            is left of it for the FFNs, and its name.
        """
        size, length = self.costs.shape, self.costs.sequence_length
        layers = [[LayerSpec(e, *shape) for shape in shapes] for e in expressions]
        allowed = np.ones((len(layers), len(shapes)), dtype=bool)
        if self.memory_mb is not None:
            elements = self.memory_mb * MIB / (4 * self.costs.batch_size * length)
            live = [[layer_live(spec, size, self.costs.policy) for spec in row] for row in layers]
            allowed &= (np.asarray(live) <= elements) & (fixed_live(size) <= elements)
        costs, bounds, names = [], [], []
        if self.flops is not None:
            h = size.hidden_size
            row = [ffn_flops(h, inner_width(r, size.ffn_size), n, length) for n, r in shapes]
            costs.append(np.tile(np.asarray(row, dtype=np.float64), (len(layers), 1)))
            bounds.append(self.flops - fixed_flops(size, length))
            names.append("flops")
        if self.latency_ms is not None:
            table = self.costs.table
            assert table is not None
            costs.append(np.asarray([[table.layer(spec) for spec in row] for row in layers]))
            bounds.append(self.latency_ms - table.fixed)
            names.append("latency_ms")
        return allowed, costs, bounds, names


def describe(limits: Limits | None, window: tuple[int, int]) -> str:
    """The parameter window and every limit that is set, in one line."""
    active = limits.active if limits is not None else {}
    parts = [f"budget.{name} {text(name, most)}" for name, most in active.items()]
    return ", ".join([f"budget.params {window[0]}..{window[1]}", *parts])


class LimitedTable:
    """Assignments of a (stack, ratio) to each layer inside a parameter window and under further sums.

    Args:
        table: the window's exact table.
        allowed: bool [L, C], choices a layer may have.
        costs: per limit float64 [L, C], non-negative.
        bounds: per limit the most its sum may be.
    """

    def __init__(
        self, table: BudgetTable, allowed: np.ndarray, costs: Sequence[np.ndarray], bounds: Sequence[float]
    ) -> None:
        self.table, self.allowed = table, allowed
        self.costs, self.bounds = list(costs), list(bounds)
        self._layers = np.arange(table.num_layers)

    def fits(self, choices: Sequence[int]) -> bool:
        """Whether an assignment (choice per layer) is inside everything."""
        return self.table.fits(choices) and self.limited(choices)

    def limited(self, choices: Sequence[int]) -> bool:
        """Whether an assignment keeps the limits, whatever its parameters."""
        picked = self._layers, np.asarray(choices)
        return bool(self.allowed[picked].all()) and all(
            float(cost[picked].sum()) <= bound for cost, bound in zip(self.costs, self.bounds, strict=True)
        )

    def sample(self, rng: np.random.Generator) -> list[int] | None:
        """A uniform draw from what fits; None if nothing was found."""
        if self.table.count():
            for _ in range(QUICK_DRAWS):
                choices = self.table.sample(rng)
                if self.limited(choices):
                    return choices
        if min(self.bounds, default=0.0) < 0 or not self._ways[0].max():
            return None
        for _ in range(GRID_DRAWS):
            choices = self._from_grid(rng)
            if self.fits(choices):
                return choices
        return None

    def lowest(self, limit: int) -> float | None:
        """The smallest sum of one limit's costs inside the parameter window, exactly; None if the window is empty."""
        sums, least = np.zeros(1, dtype=np.int64), np.zeros(1)
        for layer in self._layers:
            open_to = np.flatnonzero(self.allowed[layer])
            totals = (sums[None, :] + self.table.costs[open_to, None]).ravel()
            values = (least[None, :] + self.costs[limit][layer, open_to, None]).ravel()
            sums, place = np.unique(totals, return_inverse=True)
            least = np.full(len(sums), np.inf)
            np.minimum.at(least, place, values)
        inside = (sums >= self.table.low) & (sums <= self.table.high)
        return float(least[inside].min()) if inside.any() else None

    @cached_property
    def _steps(self) -> tuple[np.ndarray, tuple[int, ...], int]:
        """Grid costs int64 [L, C, 1 + limits], grid sizes, and the lowest parameter cell that may fit."""
        limits = len(self.costs)
        others = max(24, round((CELLS / 8) ** (1 / (limits + 1))))
        sizes = (max(64, CELLS // others**limits), *([others] * limits))
        every = [np.tile(self.table.costs.astype(np.float64), (len(self._layers), 1)), *self.costs]
        units = [max(b, 1e-12) / n for b, n in zip([max(self.table.high, 1), *self.bounds], sizes, strict=True)]
        # a hair downwards: rounding up would lose assignments that just fit
        steps = np.stack([np.floor(c / u * (1 - 1e-12)) for c, u in zip(every, units, strict=True)], axis=-1)
        lowest = int(np.floor(self.table.low / units[0])) - len(self._layers)
        return np.minimum(steps, 2**31).astype(np.int64), sizes, max(lowest, 0)

    @cached_property
    def _ways(self) -> list[np.ndarray]:
        """Per layer the number of completions for every cell of what is spent so far, float64."""
        steps, sizes, lowest = self._steps
        last = np.zeros([n + 1 for n in sizes])
        last[lowest:] = 1.0
        ways = [last]
        for layer in reversed(self._layers):
            here = np.zeros_like(last)
            for choice in np.flatnonzero(self.allowed[layer]):
                step = steps[layer, choice]
                if all(s <= n for s, n in zip(step, sizes, strict=True)):
                    target = tuple(slice(0, n + 1 - s) for s, n in zip(step, sizes, strict=True))
                    here[target] += ways[0][tuple(slice(s, None) for s in step)]
            ways.insert(0, here)
        return [ways[0][(slice(0, 1),) * ways[0].ndim], *ways[1:]]

    def _from_grid(self, rng: np.random.Generator) -> list[int]:
        steps, sizes, _ = self._steps
        spent = np.zeros(len(sizes), dtype=np.int64)
        chosen: list[int] = []
        for layer in self._layers:
            after = spent + steps[layer]
            inside = (after <= np.asarray(sizes)).all(axis=1) & self.allowed[layer]
            weights = np.zeros(len(after))
            weights[inside] = self._ways[layer + 1][tuple(after[inside].T)]
            running = np.cumsum(weights)
            choice = int(np.searchsorted(running, rng.random() * running[-1], side="right"))
            chosen.append(choice)
            spent = after[choice]
        return chosen


def unreachable(
    limits: Limits,
    table: BudgetTable,
    shapes: Sequence[tuple[int, Fraction]],
    expressions: Sequence[Sequence[Expression]],
    window: tuple[int, int],
) -> str:
    """Which limit leaves nothing, and what would be possible, in one line.

    Args:
        limits: none of whose architectures was found.
        table: of the parameter window.
        shapes: (stack, ratio) choices, in the order of the table's costs.
        expressions: sets of expressions that were tried, one expression per layer.
        window: of parameters, as the user knows it.
    """
    within = f"within budget.params {window[0]}..{window[1]}"
    reached: dict[str, float] = {}
    for tried in expressions:
        allowed, costs, bounds, names = limits.of_layers(tried, shapes)
        if not allowed.any(axis=1).all():
            continue
        reached.setdefault("memory_mb", 0.0)
        limited = LimitedTable(table, allowed, costs, bounds)
        for index, (name, bound) in enumerate(zip(names, bounds, strict=True)):
            least = limited.lowest(index)
            if least is not None:
                fixed = getattr(limits, name) - bound
                reached[name] = min(reached.get(name, np.inf), least + fixed)
    for name, most in limits.active.items():
        if name not in reached:
            return f"budget.{name}: no architecture {within} keeps {text(name, most)}: raise it"
        if reached[name] > most:
            return (
                f"budget.{name}: no architecture {within} needs at most {text(name, most)}; the least found is"
                f" {text(name, reached[name])}: raise it, or widen budget.params"
            )
    return f"budget: no architecture keeps all of {describe(limits, window)}: raise one of them"
