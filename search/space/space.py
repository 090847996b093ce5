"""The search space: which architectures there are, and how to draw, change, check and describe them.

A `SearchSpace` joins rules of expressions (`rules`), random valid expressions (`generate`, `mutate`) and the parameter
budget over (stack, ratio) (`choices`, `budget`). Trees of operators cost no parameters, so `sample` draws trees layer
by layer, then (stack, ratio) of all layers, and which of their weights are Kronecker products, uniformly from the
assignments inside the budget. Everything returned lies in the space.

Stage 1 searches the whole space, stage 2 `with_shapes` (expressions only), stage 3 `with_expressions` ((stack, ratio)
only). Source: EfficientBERT (Dong et al., Findings of EMNLP 2021), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape, inner_width
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, Expression, kron_weights, with_kron
from kernels.language.operators import LINEAR, PAPER_BINARY, PAPER_UNARY
from kernels.reference.fingerprint import fingerprint
from search.space import options
from search.space.choices import Choice, Shape, join, kron_choices, make_groups
from search.space.encode import counted_operators, encode, feature_names
from search.space.features import features
from search.space.generate import ExpressionGenerator
from search.space.limits import Limits
from search.space.mutate import mutate_expression
from search.space.rules import Rules, check
from search.space.window import Window

_OPTIONS = (
    "budget", "stacks", "ratios", "activations", "binaries", "linears", "heights", "policy", "layer_expressions",
    "layer_shapes", "kron_block", "fixed_expressions", "fixed_shapes", "limits",
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
        linears: kinds of linear allowed for each weight, `linear` and `kron`.
        heights: (lowest, highest) expression height.
        policy: width policy, `"truncate"` or `"pad"`.
        layer_expressions, layer_shapes: `"per-layer"`, or `"shared"` by all layers of an architecture.
        kron_block: how Kronecker weights are factored (`kernels.language.kron_shape`); None takes the shape's, or the
            rule.
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
        linears: Sequence[str] = (LINEAR,),
        heights: Sequence[int] = (3, 7),
        policy: str = "truncate",
        layer_expressions: str = "per-layer",
        layer_shapes: str = "per-layer",
        kron_block: Sequence[int] | None = None,
        fixed_expressions: Sequence[Expression] | None = None,
        fixed_shapes: Sequence[Shape] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits
        self.policy = options.policy(policy)
        self.stacks = options.stacks(stacks)
        self.ratios = options.ratios(ratios)
        self.heights = options.heights(heights)
        self.activations = options.operators("activations", activations, arity=1)
        self.binaries = options.operators("binaries", binaries, arity=2)
        self.linears = options.linears(linears)
        self.layer_expressions = options.sharing("layer_expressions", layer_expressions)
        self.layer_shapes = options.sharing("layer_shapes", layer_shapes)
        self.shape = options.with_block(shape, self.ratios, self.linears, kron_block)
        self.kron_block = self.shape.kron_block
        inners = tuple(dict.fromkeys(self.inner_width(ratio) for ratio in self.ratios))
        operators = (self.activations, self.binaries, *self.heights)
        self.rules = Rules(shape.hidden_size, inners, self.policy, *operators, self.linears)
        self.shapes: tuple[Shape, ...] = tuple(product(self.stacks, self.ratios))
        self.krons = kron_choices(self.linears)
        self.counted = counted_operators(self.activations, self.binaries, self.linears)
        self.fixed_shapes = options.fixed_shapes(fixed_shapes, shape.num_layers, self.shapes)
        self.fixed_expressions = options.fixed_expressions(fixed_expressions, shape.num_layers, self.rules)
        self._window = Window(self.shape, self._options(), budget, limits)
        self.budget = self._window.budget
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
        if self.count_shapes():
            if self._window.limited:
                self._check_limits()
            return True
        smallest, largest = self.reachable()
        if self.fixed_shapes is not None and smallest == largest:
            raise UserError(f"budget.params: the fixed shapes have {smallest} parameters, outside {low}..{high}")
        raise UserError(
            f"budget.params: no architecture has {low}..{high} parameters; this space reaches"
            f" {smallest}..{largest}, nearest to the window {' and '.join(map(str, self._window.nearest()))}"
        )

    def reachable(self) -> tuple[int, int]:
        """Smallest and largest parameter count of the space, whatever the budget."""
        return self._window.reachable()

    def count_shapes(self) -> int:
        """Exact number of (stack, ratio) assignments in the budget window, Kronecker weights included."""
        return self._window.count()

    @cached_property
    def generator(self) -> ExpressionGenerator:
        """Draws valid expressions."""
        return ExpressionGenerator(replace(self.rules, linears=(LINEAR,)))  # a `kron` is made of a `linear`

    def sample(self, rng: np.random.Generator) -> Architecture:
        """A random architecture: (stack, ratio) uniform over those in the budget, expressions as in `generate`.

        With limits that depend on expressions, those are drawn until some (stack, ratio) fit them.

        Raises:
            UserError: nothing within the limits was found.
        """
        for _ in range(_EXPRESSION_DRAWS):
            trees = self._draw_trees(rng)
            choices = self._window.draw(trees, rng)
            if choices is not None:
                return join(trees, choices)
            if self.fixed_expressions is not None:
                break
        raise UserError(f"budget: found no architecture within {self._window.describe()}: raise a limit")

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
        for shared, what, values in (
            (self.shares_expressions, "expression", {layer.expression for layer in arch.layers}),
            (self.shares_shapes, "stack and ratio", {(layer.stack, layer.ratio) for layer in arch.layers}),
        ):
            if shared and len(values) > 1:
                return f"layers differ in {what}, which all share in this space"
        total = self.parameters(arch)
        if not self.budget[0] <= total <= self.budget[1]:
            return f"{total} parameters are outside the budget {self.budget[0]}..{self.budget[1]}"
        return self.limits.violation(arch) if self.limits is not None else None

    def encode(self, arch: Architecture) -> np.ndarray:
        """Feature vector, float64, of the length of `feature_names()`; see `search.space.encode`."""
        return encode(arch, self.shape, self.budget, self.counted)

    def features(self, arch: Architecture) -> np.ndarray:
        """Structure and cost, float64 [layers, D]; see `search.space.features`."""
        return features(arch, self.shape, self.stacks, self.ratios, self.counted)

    def feature_names(self) -> list[str]:
        """Names of the entries of `encode`."""
        return feature_names(self.shape.num_layers, self.counted)

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
        """The GELU variants a search starts from: one for every (stack, ratio) and every choice of Kronecker weights,
        all layers alike where the budget allows, otherwise with as few layers changed as bring it into the window;
        duplicates left out. Empty where the GELU expression is not in the space."""
        seeds = [join([GELU_FFN] * self.shape.num_layers, choices) for choices in self._window.uniform()]
        found = [seed for seed in dict.fromkeys(seeds) if self.contains(seed)]
        if not found and self._window.limited:  # none is nearly uniform and within the limits
            trees = [GELU_FFN] * self.shape.num_layers
            choices = self._window.draw(trees, np.random.default_rng(0))
            seed = join(trees, choices) if choices is not None else None
            found = [seed] if seed is not None and self.contains(seed) else []
        return found

    @property
    def shares_expressions(self) -> bool:
        """Whether all layers of an architecture have one expression."""
        return self.layer_expressions == "shared"

    @property
    def shares_shapes(self) -> bool:
        """Whether all layers of an architecture have one (stack, ratio)."""
        return self.layer_shapes == "shared"

    def _options(self) -> list[tuple[tuple[Choice, ...], ...]]:
        """Choices per layer of every group."""
        layers = range(self.shape.num_layers)
        expressions, shapes = self.fixed_expressions, self.fixed_shapes
        krons = [self.krons if expressions is None else (kron_weights(expressions[i]),) for i in layers]
        return make_groups(
            krons,
            [self.shapes if shapes is None else (shapes[i],) for i in layers],
            share_kron=self.shares_expressions and expressions is None and len(self.krons) > 1,
            share_shape=self.shares_shapes and shapes is None,
        )

    def _draw_trees(self, rng: np.random.Generator) -> Sequence[Expression]:
        """One expression per layer; which weights are Kronecker products is left to the choices."""
        if self.fixed_expressions is not None:
            return self.fixed_expressions
        if self.shares_expressions:
            return [self.generator.sample(rng)] * self.shape.num_layers
        return [self.generator.sample(rng) for _ in range(self.shape.num_layers)]

    def _check_limits(self) -> None:
        """Raises `UserError` unless something within the limits is found, naming what is out of reach."""
        rng = np.random.default_rng(0)
        drawn: list[Sequence[Expression]] = [self.fixed_expressions] if self.fixed_expressions is not None else []
        if not drawn:
            drawn = [(GELU_FFN,) * self.shape.num_layers, *(self._draw_trees(rng) for _ in range(32))]
        self._window.check_limits(drawn, self.fixed_shapes is not None)

    def _variant(self, **changes: Any) -> SearchSpace:
        return SearchSpace(self.shape, **{**{name: getattr(self, name) for name in _OPTIONS}, **changes})

    def _mutated(self, arch: Architecture, rng: np.random.Generator) -> Architecture | None:
        count = 1
        while count < len(arch.layers) and rng.random() < _EXTRA_LAYER:
            count += 1
        picked = [int(i) for i in rng.permutation(len(arch.layers))]
        both = rng.random() < 0.2
        free = not self._window.is_single
        change_expression = self.fixed_expressions is None and (not free or both or rng.random() < 0.6)
        change_choice = free and (not change_expression or both)
        trees = list(self.fixed_expressions or (s.expression for s in arch.layers))
        choices = [Choice(kron_weights(tree), s.stack, s.ratio) for tree, s in zip(trees, arch.layers, strict=True)]
        if self.fixed_shapes is not None:
            choices = [Choice(c.kron, *shape) for c, shape in zip(choices, self.fixed_shapes, strict=True)]
        if change_expression:
            for index in picked[:1] if self.shares_expressions else picked[:count]:
                child = mutate_expression(with_kron(trees[index], ()), self.generator, rng)
                if child is None:
                    return None
                if self.shares_expressions:
                    trees = [child] * len(trees)
                else:
                    trees[index] = child
        if change_choice:
            choices = self._window.redraw(trees, choices, picked, count, rng)
        return join(trees, choices)

    def _layer_violation(self, index: int, layer: LayerSpec) -> str | None:
        if layer.heads is not None:
            return f"{layer.heads} attention heads: all layers of the space have all of them"
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
