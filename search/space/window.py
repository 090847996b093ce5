"""The half of an architecture that costs parameters: (stack, ratio) of all layers, and which weights are Kronecker
products, inside the budget window and within further limits.

`choices` says what layers may have, `budget` counts and draws assignments by their parameters, `limits` by what else
they cost. A `Window` joins the three for one space. Further limits depend on the trees of operators, so drawing takes
those; counting is by parameters alone.

Rejected: drawing from all assignments until one lies in the window; a narrow one would be looked for for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from engine.architecture.params import ffn_parameters, fixed_parameters
from engine.architecture.shape import ModelShape, inner_width
from engine.errors import UserError
from kernels.language.expression import Expression
from search.space import options as checks
from search.space.choices import Choice, Group, draw, join
from search.space.limits import LimitedTable, Limits, describe, draw_limited, unreachable


class Window:
    """Choices of all layers inside budget and limits.

    Args:
        shape: sizes of the student.
        options: per group, per layer, what it may have (`choices.make_groups`).
        budget: (low, high) total parameters, both included; None takes the middle third of what can be reached, or all
            of it where nothing lies in the middle or limits are set.
        limits: the most an architecture may cost otherwise.

    Attributes:
        budget: the window.

    Raises:
        UserError: `budget` is not a window.
    """

    def __init__(
        self,
        shape: ModelShape,
        options: Sequence[tuple[tuple[Choice, ...], ...]],
        budget: Sequence[float] | None,
        limits: Limits | None,
    ) -> None:
        self.shape, self.limits = shape, limits
        self._options = options
        self._last_limited: tuple[tuple[Expression, ...], list[tuple[LimitedTable, list[str]]]] | None = None
        self.budget = self._default_budget() if budget is None else checks.budget(budget)

    @property
    def limited(self) -> bool:
        """Whether something beside parameters is limited."""
        return self.limits is not None and bool(self.limits.active)

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to choose."""
        return len(self._groups) == 1 and self._groups[0].is_single

    def describe(self) -> str:
        """All that must be kept, for messages."""
        return describe(self.limits, self.budget)

    def reachable(self) -> tuple[int, int]:
        """Smallest and largest parameter count, whatever the budget."""
        fixed = fixed_parameters(self.shape)
        sums = [(sum(map(min, costs)), sum(map(max, costs))) for costs in map(self._costs, self._options)]
        return fixed + min(low for low, _ in sums), fixed + max(high for _, high in sums)

    def count(self) -> int:
        """Exact number of assignments in the window."""
        return sum(group.table.count() for group in self._groups)

    def nearest(self) -> list[int]:
        """The parameter counts next to an empty window, below and above it."""
        sums = [group.table.nearest_sums() for group in self._groups]
        below = max((s for s, _ in sums if s is not None), default=None)
        above = min((s for _, s in sums if s is not None), default=None)
        return [s + fixed_parameters(self.shape) for s in (below, above) if s is not None]

    def uniform(self) -> list[list[Choice]]:
        """For every option an assignment in the window with as many layers as possible at that option."""
        return [choices for group in self._groups for choices in group.uniform()]

    def draw(self, trees: Sequence[Expression], rng: np.random.Generator) -> list[Choice] | None:
        """One choice per layer inside window and limits; None where none was found."""
        if not self.limited:
            return draw(self._groups, rng)
        tables = [table for table, _ in self._limited_tables(trees)]
        return draw_limited(self._groups, tables, rng)

    def redraw(
        self,
        trees: Sequence[Expression],
        choices: list[Choice],
        picked: Sequence[int],
        count: int,
        rng: np.random.Generator,
    ) -> list[Choice]:
        """Other choices for the first `count` of the `picked` layers, or more where fewer leave no other choice; where
        layers share theirs, half of the time for all."""

        def within(drawn: Sequence[Choice]) -> bool:
            return self.limits is None or self.limits.violation(join(trees, drawn)) is None

        keep = within if self.limited else None
        own = next((group for group in self._groups if group.holds(choices)), None)
        if len(self._groups) > 1 and (own is None or own.is_single or rng.random() < 0.5):
            return self.draw(trees, rng) or choices
        return (own or self._groups[0]).redraw(choices, picked, count, rng, keep)

    def check_limits(self, drawn: Sequence[Sequence[Expression]], fixed_shapes: bool) -> None:
        """Raises `UserError` unless something within the limits is found for one of the sets of trees, naming what is
        out of reach."""
        rng = np.random.default_rng(0)
        if any(self.draw(trees, rng) is not None for trees in drawn):
            return
        if fixed_shapes:
            raise UserError(f"budget: the fixed shapes are not within {self.describe()}: raise a limit")
        tried = [table for trees in drawn for table in self._limited_tables(trees)]
        assert self.limits is not None
        raise UserError(unreachable(self.limits, tried, self.budget))

    @cached_property
    def _groups(self) -> list[Group]:
        return self._groups_of(*self.budget)

    def _groups_of(self, low: int, high: int) -> list[Group]:
        fixed = fixed_parameters(self.shape)
        return [Group(options, self._costs(options), low - fixed, high - fixed) for options in self._options]

    def _costs(self, options: tuple[tuple[Choice, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(self._cost(choice) for choice in row) for row in options)

    def _cost(self, choice: Choice) -> int:
        inner = inner_width(choice.ratio, self.shape.ffn_size)
        return ffn_parameters(self.shape.hidden_size, inner, choice.stack, choice.kron, self.shape.kron_block)

    def _default_budget(self) -> tuple[int, int]:
        low, high = self.reachable()
        if self.limited:
            return low, high
        third = (high - low) // 3
        window = low + third, high - third
        return window if any(group.table.count() for group in self._groups_of(*window)) else (low, high)

    def _limited_tables(self, trees: Sequence[Expression]) -> list[tuple[LimitedTable, list[str]]]:
        """Per group the table of choices for these expressions, and the names of its sums."""
        assert self.limits is not None
        key = tuple(trees)
        if self._last_limited is None or self._last_limited[0] != key:
            tables = []
            for group in self._groups:
                rows = [
                    [join([t], [c]).layers[0] for c in options] for t, options in zip(key, group.options, strict=True)
                ]
                allowed, costs, bounds, names = self.limits.of_layers(rows)
                tables.append((LimitedTable(group.table, allowed, costs, bounds), names))
            self._last_limited = key, tables
        return self._last_limited[1]
