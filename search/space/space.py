"""The search space: which architectures there are, and how to draw, change, check and describe them.

A `SearchSpace` joins three parts: rules of expressions (`rules`), random valid expressions (`generate`, `mutate`) and
the parameter budget over (stack, ratio) (`budget`). Expressions cost no parameters, so the two halves are independent
and `sample` is: expressions drawn layer by layer, (stack, ratio) of all layers drawn uniformly from the assignments
inside the budget window. Everything returned lies in the space; nothing is drawn to be thrown away.

Stages: stage 1 searches the whole space, stage 2 `with_shapes` (expressions only), stage 3 `with_expressions`
((stack, ratio) only). Expressions are valid at every ratio of the space, so stage 3 may move any layer.

Rejected: one class per stage. The stages differ in what is fixed and in nothing else.

Source: EfficientBERT (Dong et al., Findings of EMNLP 2021), sections 3.2 and 3.3.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from engine.architecture import Architecture, LayerSpec, check_stack, parse_ratio
from engine.errors import UserError
from engine.params import ModelShape, count_parameters, count_shapes, ffn_parameters, fixed_parameters, inner_width
from kernels.expression import GELU_FFN, Expression, ExpressionError
from kernels.fingerprint import fingerprint
from kernels.operators import PAPER_BINARY, PAPER_UNARY
from kernels.widths import validate
from search.space import options
from search.space.budget import BudgetTable, budget_table
from search.space.encode import encode, feature_names
from search.space.features import features
from search.space.generate import ExpressionGenerator
from search.space.limits import LimitedTable, Limits, describe, unreachable
from search.space.mutate import mutate_expression
from search.space.rules import Rules, check

Shape = tuple[int, Fraction]
"""(stack, ratio) of a layer."""

_OPTIONS = (
    "budget", "stacks", "ratios", "activations", "binaries", "heights", "policy", "fixed_expressions", "fixed_shapes",
    "limits",
)  # fmt: skip
_MUTATION_TRIES = 64
_EXTRA_LAYER = 0.3
"""Chance that a mutation changes one layer more; applied again after each."""
_EXPRESSION_DRAWS = 200
"""Sets of expressions drawn before none is taken to be within the limits."""


class NoNeighbour(RuntimeError):
    """No architecture of the space differs from the given one."""


class SearchSpace:
    """The architectures a search may propose.

    Args:
        shape: sizes of the student. `fit_dense` counts towards the budget if the shape has a teacher width.
        budget: (low, high) total parameters, both included; None takes the middle third of what can be reached, or all
            of it where `limits` bound something else.
        stacks, ratios: what a layer may have.
        activations, binaries: operator names allowed in expressions.
        heights: (lowest, highest) expression height.
        policy: width policy, `"truncate"` or `"pad"`.
        fixed_expressions: one per layer; only (stack, ratio) is searched.
        fixed_shapes: one (stack, ratio) per layer; only expressions are searched.
        limits: the most an architecture may cost in FLOPs, memory or latency.

    Raises:
        UserError: a value has the wrong type or range, no valid expression exists, or nothing fits the budget (the
            message names the smallest and largest parameter count that can be reached).
    """

    def __init__(
        self,
        shape: ModelShape,
        budget: Sequence[float] | None = None,
        stacks: Sequence[int] = (1, 2, 3, 4),
        ratios: Sequence[Any] = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)),
        *,
        activations: Sequence[str] = PAPER_UNARY,
        binaries: Sequence[str] = PAPER_BINARY,
        heights: Sequence[int] = (3, 7),
        policy: str = "truncate",
        fixed_expressions: Sequence[Expression] | None = None,
        fixed_shapes: Sequence[Shape] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.shape = shape
        self.limits = limits
        self.policy = options.policy(policy)
        self.stacks = options.stacks(stacks)
        self.ratios = options.ratios(ratios)
        self.heights = options.heights(heights)
        self.activations = options.operators("activations", activations, arity=1)
        self.binaries = options.operators("binaries", binaries, arity=2)
        inners = tuple(dict.fromkeys(self.inner_width(ratio) for ratio in self.ratios))
        self.rules = Rules(shape.hidden_size, inners, self.policy, self.activations, self.binaries, *self.heights)
        self.shapes: tuple[Shape, ...] = tuple(product(self.stacks, self.ratios))
        self._places = {shape: place for place, shape in enumerate(self.shapes)}
        self._last_limited: tuple[tuple[Expression, ...], LimitedTable, list[str]] | None = None
        self.fixed_shapes = self._check_fixed_shapes(fixed_shapes)
        self.fixed_expressions = self._check_fixed_expressions(fixed_expressions)
        self.budget = self._default_budget() if budget is None else options.budget(budget)
        if self.fixed_expressions is None:
            self.generator  # noqa: B018 -- raises now if no expression obeys the rules
        self.feasible()

    @classmethod
    def from_config(cls, shape: ModelShape, **values: Any) -> SearchSpace:
        """The space of a configuration: keyword arguments as in the constructor, numbers as a YAML file gives them.

        Raises:
            UserError: as the constructor, and for an option the space does not have.
        """
        for name in values:
            if name not in _OPTIONS:
                raise UserError(f"space.{name}: unknown option; known are {', '.join(_OPTIONS)}")
        return cls(shape, **values)

    def with_shapes(self, shapes: Sequence[Shape]) -> SearchSpace:
        """The part of this space with these (stack, ratio), layer by layer: expressions alone are searched."""
        return self._variant(fixed_shapes=tuple(shapes))

    def with_expressions(self, expressions: Sequence[Expression]) -> SearchSpace:
        """The part of this space with these expressions, layer by layer: (stack, ratio) alone is searched."""
        return self._variant(fixed_expressions=tuple(expressions))

    def feasible(self) -> bool:
        """True; the constructor has found something in the budget.

        Raises:
            UserError: nothing fits; the message names the window and the reachable minimum and maximum.
        """
        low, high = self.budget
        if self.fixed_shapes is not None:
            total = count_shapes(self.fixed_shapes, self.shape)
            if not low <= total <= high:
                raise UserError(f"budget.params: the fixed shapes have {total} parameters, outside {low}..{high}")
        elif self.count_shapes() == 0:
            smallest, largest = self.reachable()
            fixed = fixed_parameters(self.shape)
            nearest = [s + fixed for s in self._table.nearest_sums() if s is not None]
            raise UserError(
                f"budget.params: no architecture has {low}..{high} parameters; this space reaches"
                f" {smallest}..{largest}, nearest to the window {' and '.join(map(str, nearest))}"
            )
        if self._limited:
            self._check_limits()
        return True

    def reachable(self) -> tuple[int, int]:
        """Smallest and largest parameter count over all (stack, ratio), whatever the budget."""
        fixed = fixed_parameters(self.shape)
        costs = [self._cost(s) for s in self.shapes]
        return fixed + self.shape.num_layers * min(costs), fixed + self.shape.num_layers * max(costs)

    def count_shapes(self) -> int:
        """Exact number of (stack, ratio) assignments in the budget window."""
        return 1 if self.fixed_shapes is not None else self._table.count()

    def count_expressions(self) -> dict[int, int]:
        """Exact number of valid expressions per height."""
        return {height: self.generator.count(height) for height in range(self.heights[0], self.heights[1] + 1)}

    @cached_property
    def generator(self) -> ExpressionGenerator:
        """Draws valid expressions."""
        return ExpressionGenerator(self.rules)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random architecture: (stack, ratio) uniform over those in the budget, expressions as in `generate`.

        With limits that depend on expressions, those are drawn until some (stack, ratio) fit them.

        Raises:
            UserError: nothing within the limits was found.
        """
        for _ in range(_EXPRESSION_DRAWS):
            expressions = self.fixed_expressions or [self.generator.sample(rng) for _ in range(self.shape.num_layers)]
            shapes = self._draw_shapes(expressions, rng)
            if shapes is not None:
                return _join(expressions, shapes)
            if self.fixed_expressions is not None:
                break
        raise UserError(f"budget: found no architecture within {self._limit_text()}: raise a limit")

    def mutate(self, arch: Architecture, rng: np.random.Generator) -> Architecture:
        """An architecture of the space near `arch`, with another canonical key.

        One layer, rarely more, gets a mutated expression, another (stack, ratio), or both; a (stack, ratio) that would
        leave the budget alone is changed together with that of further layers. `arch` need not lie in the space, but
        must have its number of layers.

        Raises:
            NoNeighbour: none was found.
        """
        self._check_layers(arch)
        key = self.key(arch)
        for attempt in range(_MUTATION_TRIES):
            child = self._mutated(arch, rng) if attempt < _MUTATION_TRIES // 2 else self.sample(rng)
            if child is not None and self.key(child) != key and self.contains(child):
                return child
        raise NoNeighbour(f"the space holds no other architecture than {arch}, or next to none")

    def contains(self, arch: Architecture) -> bool:
        """Whether `arch` lies in the space, budget included."""
        return self.violation(arch) is None

    def violation(self, arch: Architecture) -> str | None:
        """Why `arch` is not in the space, in one line naming the layer; None if it is."""
        if len(arch.layers) != self.shape.num_layers:
            return f"it has {len(arch.layers)} layers, the space {self.shape.num_layers}"
        for index, layer in enumerate(arch.layers):
            reason = self._layer_violation(index, layer)
            if reason is not None:
                return f"layer {index}: {reason}"
        total = self.parameters(arch)
        if not self.budget[0] <= total <= self.budget[1]:
            return f"{total} parameters are outside the budget {self.budget[0]}..{self.budget[1]}"
        return self.limits.violation(arch) if self.limits is not None else None

    def encode(self, arch: Architecture) -> np.ndarray:
        """Feature vector, float64, of the length of `feature_names()`; see `search.space.encode`."""
        return encode(arch, self.shape, self.budget)

    def features(self, arch: Architecture) -> np.ndarray:
        """Structure and cost, float64 [layers, D]; see `search.space.features`."""
        return features(arch, self.shape, self.stacks, self.ratios)

    def feature_names(self) -> list[str]:
        """Names of the entries of `encode`."""
        return feature_names(self.shape.num_layers)

    def key(self, arch: Architecture) -> str:
        """Canonical key: architectures with equal keys compute the same function."""
        return arch.key(self.policy)

    def function_key(self, arch: Architecture) -> str:
        """Key by numeric fingerprints: equal for architectures that compute the same function, canonical or not."""
        hidden = self.shape.hidden_size
        prints = [fingerprint(s.expression, hidden, self.inner_width(s.ratio), self.policy) for s in arch.layers]
        return " ".join(f"{p}:{s.stack}x{s.ratio}" for p, s in zip(prints, arch.layers, strict=True))

    def parameters(self, arch: Architecture, *, fit_dense: bool = True) -> int:
        """Parameters of `arch` by formula, `fit_dense` included unless told otherwise."""
        return count_parameters(arch, self.shape, fit_dense=fit_dense)

    def inner_width(self, ratio: Fraction) -> int:
        """d = int(r F)."""
        return inner_width(ratio, self.shape.ffn_size)

    def gelu_seeds(self) -> list[Architecture]:
        """The GELU variants a search starts from: one for every (stack, ratio), all layers alike where the budget
        allows, otherwise with as few layers changed as bring it into the window; duplicates left out. Empty where
        the GELU expression is not in the space."""
        if self.fixed_shapes is not None:
            candidates = [list(self.fixed_shapes)]
        else:
            chosen = [self._table.closest_to_uniform(index) for index in range(len(self.shapes))]
            candidates = [[self.shapes[i] for i in choice] for choice in chosen if choice is not None]
        expressions = [GELU_FFN] * self.shape.num_layers
        seeds = [_join(expressions, shapes) for shapes in candidates]
        found = [seed for seed in dict.fromkeys(seeds) if self.contains(seed)]
        if not found and self._limited and self.fixed_shapes is None:  # none is nearly uniform and within the limits
            shapes = self._draw_shapes(expressions, np.random.default_rng(0))
            seed = _join(expressions, shapes) if shapes is not None else None
            found = [seed] if seed is not None and self.contains(seed) else []
        return found

    @cached_property
    def _table(self) -> BudgetTable:
        return self._table_of(*self.budget)

    def _table_of(self, low: int, high: int) -> BudgetTable:
        fixed = fixed_parameters(self.shape)
        return budget_table(tuple(map(self._cost, self.shapes)), self.shape.num_layers, low - fixed, high - fixed)

    def _cost(self, shape: Shape) -> int:
        return ffn_parameters(self.shape.hidden_size, self.inner_width(shape[1]), shape[0])

    @property
    def _limited(self) -> bool:
        return self.limits is not None and bool(self.limits.active)

    def _limit_text(self) -> str:
        return describe(self.limits, self.budget)

    def _limited_table(self, expressions: Sequence[Expression]) -> tuple[LimitedTable, list[str]]:
        """The table of (stack, ratio) for these expressions, and the names of its sums."""
        assert self.limits is not None
        key = tuple(expressions)
        if self._last_limited is None or self._last_limited[0] != key:
            allowed, costs, bounds, names = self.limits.of_layers(expressions, self.shapes)
            self._last_limited = key, LimitedTable(self._table, allowed, costs, bounds), names
        return self._last_limited[1:]

    def _draw_shapes(self, expressions: Sequence[Expression], rng: np.random.Generator) -> Sequence[Shape] | None:
        """One (stack, ratio) per layer inside budget and limits; None where none was found."""
        if self.fixed_shapes is not None:
            inside = not self._limited or self.limits.violation(_join(expressions, self.fixed_shapes)) is None
            return self.fixed_shapes if inside else None
        if not self._limited:
            return [self.shapes[i] for i in self._table.sample(rng)]
        choices = self._limited_table(expressions)[0].sample(rng)
        return None if choices is None else [self.shapes[i] for i in choices]

    def _check_limits(self) -> None:
        """Raises `UserError` unless something within the limits is found, naming what is out of reach."""
        rng = np.random.default_rng(0)
        drawn = [self.fixed_expressions] if self.fixed_expressions is not None else []
        if not drawn:
            drawn = [(GELU_FFN,) * self.shape.num_layers]
            drawn += [[self.generator.sample(rng) for _ in range(self.shape.num_layers)] for _ in range(32)]
        if any(self._draw_shapes(expressions, rng) is not None for expressions in drawn):
            return
        if self.fixed_shapes is not None:
            raise UserError(f"budget: the fixed shapes are not within {self._limit_text()}: raise a limit")
        raise UserError(unreachable(self.limits, self._table, self.shapes, drawn, self.budget))

    def _variant(self, **changes: Any) -> SearchSpace:
        return SearchSpace(self.shape, **{**{name: getattr(self, name) for name in _OPTIONS}, **changes})

    def _mutated(self, arch: Architecture, rng: np.random.Generator) -> Architecture | None:
        count = 1
        while count < len(arch.layers) and rng.random() < _EXTRA_LAYER:
            count += 1
        picked = [int(i) for i in rng.permutation(len(arch.layers))]
        both = rng.random() < 0.2
        change_expression = self.fixed_expressions is None and (
            self.fixed_shapes is not None or both or rng.random() < 0.6
        )
        change_shape = self.fixed_shapes is None and (not change_expression or both)
        expressions = list(self.fixed_expressions or (s.expression for s in arch.layers))
        shapes = list(self.fixed_shapes or ((s.stack, s.ratio) for s in arch.layers))
        if change_expression:
            for index in picked[:count]:
                child = mutate_expression(expressions[index], self.generator, rng)
                if child is None:
                    return None
                expressions[index] = child
        if change_shape:
            shapes = self._redraw(expressions, shapes, picked, count, rng)
        return _join(expressions, shapes)

    def _redraw(
        self,
        expressions: Sequence[Expression],
        shapes: list[Shape],
        picked: list[int],
        count: int,
        rng: np.random.Generator,
    ) -> list[Shape]:
        """New shapes for the first `count` of the `picked` layers, or more where fewer leave no other choice."""
        for changed in range(count, len(shapes) + 1):
            kept = [shapes[i] for i in picked[changed:]]
            if any(s not in self.shapes for s in kept):
                continue
            spent = sum(self._cost(s) for s in kept)
            inside = self._table.count(changed, spent)
            total = spent + sum(self._cost(shapes[i]) for i in picked[:changed])
            known = all(shapes[i] in self.shapes for i in picked[:changed])
            if inside <= (1 if known and self._table.low <= total <= self._table.high else 0):
                continue
            limited = self._limited_table(expressions)[0] if self._limited else None
            # another assignment exists, so at least every second draw differs; limits may still exclude them all
            for _ in range(_MUTATION_TRIES if limited is not None else sys.maxsize):
                drawn = list(shapes)
                for index, choice in zip(picked, self._table.sample(rng, changed, spent), strict=False):
                    drawn[index] = self.shapes[choice]
                if drawn != shapes and (limited is None or limited.limited([self._places[s] for s in drawn])):
                    return drawn
        return shapes

    def _layer_violation(self, index: int, layer: LayerSpec) -> str | None:
        if (layer.stack, layer.ratio) not in self.shapes:
            return f"stack {layer.stack} with ratio {layer.ratio} is not in the space"
        if self.fixed_shapes is not None and (layer.stack, layer.ratio) != self.fixed_shapes[index]:
            return "stack and ratio are fixed to others"
        if self.fixed_expressions is not None:
            fixed = self.fixed_expressions[index]
            return None if layer.expression == fixed else f"the expression is fixed to {fixed}"
        return check(layer.expression, self.rules)

    def _check_layers(self, arch: Architecture) -> None:
        if len(arch.layers) != self.shape.num_layers:
            raise UserError(f"layers: the architecture has {len(arch.layers)}, the space {self.shape.num_layers}")

    def _check_fixed_shapes(self, shapes: Sequence[Shape] | None) -> tuple[Shape, ...] | None:
        if shapes is None:
            return None
        if len(shapes) != self.shape.num_layers:
            raise UserError(f"fixed_shapes: {len(shapes)} given for {self.shape.num_layers} layers; give one per layer")
        checked = tuple((check_stack(stack), parse_ratio(ratio)) for stack, ratio in shapes)
        for index, chosen in enumerate(checked):
            if chosen not in self.shapes:
                raise UserError(f"fixed_shapes[{index}]: stack {chosen[0]} with ratio {chosen[1]} is not in the space")
        return checked

    def _check_fixed_expressions(self, expressions: Sequence[Expression] | None) -> tuple[Expression, ...] | None:
        if expressions is None:
            return None
        if len(expressions) != self.shape.num_layers:
            raise UserError(
                f"fixed_expressions: {len(expressions)} given for {self.shape.num_layers} layers; give one per layer"
            )
        for index, expression in enumerate(expressions):
            for inner in self.rules.inners:
                try:
                    validate(expression, self.shape.hidden_size, inner, self.policy)
                except ExpressionError as error:
                    raise UserError(f"fixed_expressions[{index}]: not valid at every ratio: {error}") from error
        return tuple(expressions)

    def _default_budget(self) -> tuple[int, int]:
        """The middle third of what can be reached, or all of it where nothing lies in the middle or limits are set."""
        low, high = self.reachable()
        if self._limited:
            return low, high
        third = (high - low) // 3
        window = low + third, high - third
        return window if self._table_of(*window).count() else (low, high)


def _join(expressions: Sequence[Expression], shapes: Sequence[Shape]) -> Architecture:
    return Architecture(tuple(LayerSpec(e, *s) for e, s in zip(expressions, shapes, strict=True)))
