"""What a layer may be besides its tree of operators: (Kronecker weights, stack, ratio), within the parameter budget.

Which weights are Kronecker products does not change the tree, but costs parameters, so it is chosen together with stack
and ratio. A space is a union of disjoint *groups*, each the product of one list of choices per layer: one group where
every layer is free; one per shape where layers share the shape, one per set of Kronecker weights where they share the
expression. Counting adds the groups' counts; a draw takes a group in proportion to its count, then an assignment
uniformly (`search.space.budget`), so all assignments in the budget are equally likely.

Rejected: drawing expressions with Kronecker weights first and shapes that fit after; combinations that no shape brings
into the budget would have to be drawn again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from kernels.language.expression import Expression, kron_weights, with_kron
from kernels.language.operators import KRON, LINEAR, WEIGHTS
from search.space.budget import BudgetTable, budget_table

Shape = tuple[int, Fraction]
"""(stack, ratio) of a layer."""
_KEEP_TRIES = 64


class Choice(NamedTuple):
    """One layer's choice.

    Attributes:
        kron: the weights that are Kronecker products.
        stack, ratio: n and r.
    """

    kron: frozenset[str]
    stack: int
    ratio: Fraction


@dataclass(frozen=True)
class Group:
    """A product of choices per layer.

    Attributes:
        options: per layer its choices, as many for every layer.
        costs: their parameters.
        low, high: window of the sum of costs.
    """

    options: tuple[tuple[Choice, ...], ...]
    costs: tuple[tuple[int, ...], ...]
    low: int
    high: int

    @cached_property
    def table(self) -> BudgetTable:
        """Counts and draws of all layers."""
        return self._table(self.costs, self.low, self.high)

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self.options[0]) == 1

    def holds(self, choices: Sequence[Choice]) -> bool:
        """Whether each layer's choice is one of its options, whatever the sum."""
        return all(choice in options for choice, options in zip(choices, self.options, strict=True))

    def places(self, choices: Sequence[Choice]) -> list[int]:
        """Per layer the place of its choice among its options."""
        return [options.index(choice) for choice, options in zip(choices, self.options, strict=True)]

    def sample(self, rng: np.random.Generator) -> list[Choice]:
        """Uniform over the assignments in the window; there must be one."""
        if self.is_single:
            return [options[0] for options in self.options]
        return [options[i] for options, i in zip(self.options, self.table.sample(rng), strict=True)]

    def redraw(
        self,
        choices: Sequence[Choice],
        picked: Sequence[int],
        count: int,
        rng: np.random.Generator,
        keep: Callable[[Sequence[Choice]], bool] | None = None,
    ) -> list[Choice]:
        """Other choices for the first `count` of the `picked` layers, or more where fewer leave no other choice.

        With `keep` only what it accepts is returned, of a bounded number of draws.
        """
        for changed in range(count, len(choices) + 1):
            free, kept = picked[:changed], picked[changed:]
            if any(choices[i] not in self.options[i] for i in kept):
                continue
            spent = sum(self._cost(i, choices[i]) for i in kept)
            table, outside = self._part(free, spent)
            known = all(choices[i] in self.options[i] for i in free)
            total = spent + sum(self._cost(i, choices[i]) for i in free) if known else 0
            if table.count(changed, outside) <= (1 if known and self.low <= total <= self.high else 0):
                continue
            # another assignment exists, so at least every second draw differs; `keep` may still refuse them all
            for _ in range(_KEEP_TRIES if keep is not None else sys.maxsize):
                drawn = list(choices)
                for index, option in zip(free, table.sample(rng, changed, outside), strict=True):
                    drawn[index] = self.options[index][option]
                if drawn != list(choices) and (keep is None or keep(drawn)):
                    return drawn
        return list(choices)

    def uniform(self) -> Iterable[list[Choice]]:
        """For every option an assignment in the window with as many layers as possible at that option."""
        for index in range(len(self.options[0])):
            chosen = self.table.closest_to_uniform(index)
            if chosen is not None:
                yield [options[i] for options, i in zip(self.options, chosen, strict=True)]

    def _part(self, layers: Sequence[int], spent: int) -> tuple[BudgetTable, int]:
        """(table that counts and draws for these layers, what counts as spent outside it)."""
        if len(set(self.costs)) == 1:
            return self.table, spent
        return self._table(tuple(self.costs[i] for i in layers), self.low - spent, self.high - spent), 0

    def _table(self, costs: tuple[tuple[int, ...], ...], low: int, high: int) -> BudgetTable:
        rows = costs[0] if len(set(costs)) == 1 else costs
        return budget_table(rows, len(costs), low, high)

    def _cost(self, layer: int, choice: Choice) -> int:
        return self.costs[layer][self.options[layer].index(choice)]


def make_groups(
    krons: Sequence[Sequence[frozenset[str]]],
    shapes: Sequence[Sequence[Shape]],
    share_kron: bool,
    share_shape: bool,
) -> list[tuple[tuple[Choice, ...], ...]]:
    """Options per layer of every group.

    Args:
        krons, shapes: per layer what it may have.
        share_kron, share_shape: whether all layers have the same one; the layers' lists must then be equal.
    """
    groups = []
    for kron in krons[0] if share_kron else (None,):
        for shape in shapes[0] if share_shape else (None,):
            groups.append(
                tuple(
                    tuple(
                        Choice(k, *s)
                        for k, s in product(
                            own_krons if kron is None else (kron,), own_shapes if shape is None else (shape,)
                        )
                    )
                    for own_krons, own_shapes in zip(krons, shapes, strict=True)
                )
            )
    return groups


def draw(groups: Sequence[Group], rng: np.random.Generator) -> list[Choice]:
    """Uniform over all assignments of all groups; there must be one."""
    if len(groups) == 1:
        return groups[0].sample(rng)
    counts = [float(group.table.count()) for group in groups]
    point = rng.random() * sum(counts)
    running = np.cumsum(counts)
    last = max(i for i, count in enumerate(counts) if count)
    return groups[min(int(np.searchsorted(running, point, side="right")), last)].sample(rng)


def kron_choices(linears: tuple[str, ...]) -> tuple[frozenset[str], ...]:
    """Sets of weights that may be Kronecker products, given the kinds of linear; none first."""
    if KRON not in linears:
        return (frozenset(),)
    if LINEAR not in linears:
        return (frozenset(WEIGHTS),)
    return tuple(frozenset(WEIGHTS[k] for k in (0, 1) if bits >> k & 1) for bits in range(4))


def join(trees: Sequence[Expression], choices: Sequence[Choice]) -> Architecture:
    """The architecture with these trees of operators and choices."""
    return Architecture(
        tuple(
            LayerSpec(tree if kron_weights(tree) == c.kron else with_kron(tree, c.kron), c.stack, c.ratio)
            for tree, c in zip(trees, choices, strict=True)
        )
    )
