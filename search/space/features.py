"""What a surrogate model sees of an architecture: structure and cost, layer by layer.

One row per layer, all of one width; `names` says what its entries are:

    root_<op>, mid_<op>, pre_<op>   1 for the operator at the root, under wb2 and under wb1 (`linear` and `x` included)
    count_<op>                      how often each operator occurs (which ones: `search.space.encode`)
    height, size, residual          of the tree (see `search.space.encode`)
    stack, ratio                    n and r
    stack_<n>, ratio_<r>            1 for the layer's own, over those the space has
    cost, log_cost                  the layer's FFN parameters in units of H^2, and their logarithm

Models that measure distances (`search.samplers.gaussian`) take these; the paper's encoding is `search.space.encode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.params import layer_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression
from kernels.language.operators import LEAF, LINEAR
from search.space.encode import ALWAYS_COUNTED, has_residual

PLACES = ("root", "mid", "pre")


def _operators(counted: Sequence[str]) -> tuple[str, ...]:
    return (*counted, LINEAR, LEAF)


def names(
    stacks: Sequence[int], ratios: Sequence[Fraction], counted: Sequence[str] = ALWAYS_COUNTED
) -> tuple[str, ...]:
    """Names of the entries of a row, in a space with these stacks, ratios and operators."""
    operators = _operators(counted)
    return (
        *(f"{place}_{name}" for place in PLACES for name in operators),
        *(f"count_{name}" for name in operators),
        *("height", "size", "residual", "stack", "ratio", "cost", "log_cost"),
        *(f"stack_{n}" for n in stacks),
        *(f"ratio_{r}" for r in ratios),
    )


def features(
    arch: Architecture,
    shape: ModelShape,
    stacks: tuple[int, ...],
    ratios: tuple[Fraction, ...],
    counted: tuple[str, ...] = ALWAYS_COUNTED,
) -> np.ndarray:
    """float64 [L, D], D the number of `names(stacks, ratios, counted)`.

    Raises:
        UserError: a layer is of no search space: it names heads, has no FFN, or a ratio that is not 1/k.
    """
    for index, layer in enumerate(arch.layers):
        if layer.heads is not None or layer.stack == 0 or layer.ratio.numerator != 1:
            raise UserError(f"layers[{index}]: spaces have layers with all heads, an FFN and a ratio 1/k, got {layer}")
    divisors = tuple(r.denominator for r in ratios)  # hashed far faster than fractions
    return np.stack(
        [_layer(s.expression, s.stack, s.ratio.denominator, shape, stacks, divisors, counted) for s in arch.layers]
    )


def places(expr: Expression) -> tuple[str, str, str]:
    """Operators at the root, directly under wb2 and directly under wb1: the three places of the hand-made FFN."""
    under = {node.weight: node.args[0].op for node in expr.walk() if node.weight is not None}
    return expr.op, under["wb2"], under["wb1"]


@lru_cache(maxsize=EXPRESSIONS)
def _layer(
    expr: Expression,
    stack: int,
    divisor: int,
    shape: ModelShape,
    stacks: tuple[int, ...],
    divisors: tuple[int, ...],
    counted: tuple[str, ...],
) -> np.ndarray:
    cost = layer_parameters(LayerSpec(expr, stack, Fraction(1, divisor)), shape) / shape.hidden_size**2
    own = [*(float(n == stack) for n in stacks), *(float(k == divisor) for k in divisors)]
    row = np.array([*_tree(expr, counted), stack, 1 / divisor, cost, math.log(cost), *own])
    row.flags.writeable = False  # shared by all who ask
    return row


@lru_cache(maxsize=EXPRESSIONS)
def _tree(expr: Expression, counted: tuple[str, ...]) -> tuple[float, ...]:
    ops, operators = [node.op for node in expr.walk()], _operators(counted)
    hot = [float(found == name) for found in places(expr) for name in operators]
    counts = [float(ops.count(name)) for name in operators]
    return (*hot, *counts, float(expr.height), float(expr.size), float(has_residual(expr)))
