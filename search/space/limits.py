"""Limits on what an architecture may cost beside its parameters, and drawing (stack, ratio) inside all of them.

FLOPs and latency are sums over layers, peak memory is a maximum, so a memory limit only takes choices away from layers.
`LimitedTable` draws assignments inside the parameter window and under any number of such sums, uniformly:

    first      draws from the exact table of the window (`search.space.budget`) that happen to lie under the limits
    otherwise  from a grid of sums in coarse units, rounded down, so that it holds every assignment that fits and few
               others; what is drawn is kept if it really fits

Costs may differ from layer to layer, as latency does where expressions are fixed (docs/decisions/0024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.flops import fixed_flops, layer_flops
from engine.architecture.memory import MIB, fixed_live, layer_live
from search.space.budget import BudgetTable
from search.space.choices import Choice, Group, draw
from search.space.costs import Costs, text

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
        flops, memory_mb, latency_ms: limits, see `search.space.costs`.
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
        self, layers: Sequence[Sequence[LayerSpec]]
    ) -> tuple[np.ndarray, list[np.ndarray], list[float], list[str]]:
        """What each choice [L][C] would cost each layer.

        Returns:
            Whether memory allows it, bool [L, C]; for every other limit that is set its costs, float64 [L, C], what
            is left of it for the FFNs, and its name.
        """
        size, length = self.costs.shape, self.costs.sequence_length
        allowed = np.ones((len(layers), len(layers[0])), dtype=bool)
        if self.memory_mb is not None:
            elements = self.memory_mb * MIB / (4 * self.costs.batch_size * length)
            live = [[layer_live(spec, size, self.costs.policy) for spec in row] for row in layers]
            allowed &= (np.asarray(live) <= elements) & (fixed_live(size) <= elements)
        costs, bounds, names = [], [], []
        if self.flops is not None:
            costs.append(np.asarray([[layer_flops(s, size, length) for s in row] for row in layers], dtype=np.float64))
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
            totals = (sums[None, :] + self.table.layers[layer, open_to, None]).ravel()
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
        every = [self.table.layers.astype(np.float64), *self.costs]
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


def draw_limited(
    groups: Sequence[Group], tables: Sequence[LimitedTable], rng: np.random.Generator
) -> list[Choice] | None:
    """A draw from all groups inside everything; None if nothing was found. `tables` are the groups', in their order.

    Uniform, except where quick draws find nothing among several groups: then the first group that has something gives.
    """
    if len(groups) == 1:
        return _of_group(groups[0], tables[0], rng)
    for _ in range(QUICK_DRAWS):
        choices = draw(groups, rng)
        place = next(i for i, group in enumerate(groups) if group.holds(choices))
        if tables[place].limited(groups[place].places(choices)):
            return choices
    for place in rng.permutation(len(groups)):
        found = _of_group(groups[place], tables[place], rng)
        if found is not None:
            return found
    return None


def _of_group(group: Group, table: LimitedTable, rng: np.random.Generator) -> list[Choice] | None:
    if group.is_single:
        places = [0] * len(group.options)
        chosen = places if table.fits(places) else None
    else:
        chosen = table.sample(rng)
    return None if chosen is None else [options[i] for options, i in zip(group.options, chosen, strict=True)]


def unreachable(limits: Limits, tried: Sequence[tuple[LimitedTable, list[str]]], window: tuple[int, int]) -> str:
    """Which limit leaves nothing, and what would be possible, in one line.

    Args:
        limits: none of whose architectures was found.
        tried: tables of sets of expressions, with the names of their sums.
        window: of parameters, as the user knows it.
    """
    within = f"within budget.params {window[0]}..{window[1]}"
    reached: dict[str, float] = {}
    for limited, names in tried:
        if not limited.allowed.any(axis=1).all():
            continue
        reached.setdefault("memory_mb", 0.0)
        for index, (name, bound) in enumerate(zip(names, limited.bounds, strict=True)):
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
