"""Checks of the values a search space is configured with; each raises `UserError` naming the option.

Rejected: leaving this to the configuration library, which knows types but not that operators exist, heights are
reachable and budgets are windows; spaces are also made without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from engine.architecture.architecture import check_stack, parse_unit_ratio
from engine.architecture.shape import ModelShape, check_block, inner_width, parse_block, ruled_block
from engine.errors import UserError
from kernels.language.expression import Expression, ExpressionError
from kernels.language.operators import KRON, LINEARS, OPERATORS
from kernels.language.widths import POLICIES, validate
from search.space.rules import MAX_HEIGHT, MIN_HEIGHT, Rules

_MAX_PARAMS = 1 << 60
SHARING = ("per-layer", "shared")


def stacks(values: Any) -> tuple[int, ...]:
    """Distinct stacks, in the order given."""
    return _each("space.stacks", values, check_stack)


def ratios(values: Any) -> tuple[Fraction, ...]:
    """Distinct ratios, in the order given; fractions, numbers, texts such as `1/2` or pairs."""
    return _each("space.ratios", values, parse_unit_ratio)


def policy(value: Any) -> str:
    """A width policy."""
    if not isinstance(value, str) or value not in POLICIES:
        raise UserError(f"space.policy: {value!r:.60} is not known; use {' or '.join(POLICIES)}")
    return value


def heights(values: Any) -> tuple[int, int]:
    """Lowest and highest expression height."""
    pair = _sequence("space.heights", values)
    if len(pair) != 2 or not all(_is_int(h) and MIN_HEIGHT <= h <= MAX_HEIGHT for h in pair) or pair[0] > pair[1]:
        raise UserError(
            f"space.heights: must be lowest and highest height, integers from {MIN_HEIGHT} to {MAX_HEIGHT} in order,"
            f" got {values!r:.60}"
        )
    return pair[0], pair[1]


def operators(name: str, values: Any, arity: int) -> tuple[str, ...]:
    """Distinct operator names of this arity, in the order given."""
    known = [row.name for row in OPERATORS.values() if row.arity == arity]
    for value in (names := _sequence(f"space.{name}", values, may_be_empty=True)):
        if value not in known:
            raise UserError(f"space.{name}: {value!r:.60} is not one; known are {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def linears(values: Any) -> tuple[str, ...]:
    """Distinct kinds of linear, in the order of `LINEARS`."""
    for value in (names := _sequence("space.linears", values)):
        if value not in LINEARS:
            raise UserError(f"space.linears: {value!r:.60} is not one; known are {', '.join(LINEARS)}")
    return tuple(name for name in LINEARS if name in names)


def sharing(name: str, value: Any) -> str:
    """Whether layers choose for themselves."""
    if not isinstance(value, str) or value not in SHARING:
        raise UserError(f"space.{name}: {value!r:.60} is not known; use {' or '.join(SHARING)}")
    return value


def kron_block(value: Any) -> tuple[int, int] | None:
    """A Kronecker block [p, q], or None for the rule."""
    try:
        return None if value is None else parse_block(value)
    except UserError as error:
        raise UserError(f"space.{error}") from error


def with_block(shape: ModelShape, ratios: Sequence[Fraction], linears: Sequence[str], block: Any = None) -> ModelShape:
    """`shape` with the block its Kronecker weights are factored by; as it is where there are none."""
    given = kron_block(block)
    if KRON not in linears:
        return shape
    chosen = given or shape.kron_block or ruled_block(shape.hidden_size, shape.ffn_size, tuple(ratios))
    for ratio in ratios:
        try:
            check_block(chosen, shape.hidden_size, inner_width(ratio, shape.ffn_size))
        except UserError as error:
            raise UserError(f"space.{error}") from error
    return replace(shape, kron_block=chosen)


def budget(values: Any) -> tuple[int, int]:
    """A window (low, high) of parameter counts; numbers may be written as floats (15e6)."""
    pair = _sequence("budget.params", values)
    if len(pair) != 2 or not all(_is_number(n) and 0 <= n <= _MAX_PARAMS for n in pair) or pair[0] > pair[1]:
        raise UserError(
            f"budget.params: must be lowest and highest parameter count, two numbers in order, got {values!r:.60}"
        )
    return math.ceil(pair[0]), math.floor(pair[1])


def fixed_shapes(
    shapes: Sequence[tuple[int, Fraction]] | None, layers: int, allowed: Sequence[tuple[int, Fraction]]
) -> tuple[tuple[int, Fraction], ...] | None:
    """One allowed (stack, ratio) per layer, or None."""
    if shapes is None:
        return None
    if len(shapes) != layers:
        raise UserError(f"fixed_shapes: {len(shapes)} given for {layers} layers; give one per layer")
    checked = tuple((check_stack(stack), parse_unit_ratio(ratio)) for stack, ratio in shapes)
    for index, chosen in enumerate(checked):
        if chosen not in allowed:
            raise UserError(f"fixed_shapes[{index}]: stack {chosen[0]} with ratio {chosen[1]} is not in the space")
    return checked


def fixed_expressions(
    expressions: Sequence[Expression] | None, layers: int, rules: Rules
) -> tuple[Expression, ...] | None:
    """One expression per layer, valid at every inner width of the rules, or None."""
    if expressions is None:
        return None
    if len(expressions) != layers:
        raise UserError(f"fixed_expressions: {len(expressions)} given for {layers} layers; give one per layer")
    for index, expression in enumerate(expressions):
        for inner in rules.inners:
            try:
                validate(expression, rules.hidden, inner, rules.policy)
            except ExpressionError as error:
                raise UserError(f"fixed_expressions[{index}]: not valid at every ratio: {error}") from error
    return tuple(expressions)


def _each(name: str, values: Any, convert: Callable[[Any], Any]) -> tuple[Any, ...]:
    found = []
    for value in _sequence(name, values):
        try:
            found.append(convert(value))
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    return tuple(dict.fromkeys(found))


def _sequence(name: str, values: Any, may_be_empty: bool = False) -> Sequence[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise UserError(f"{name}: must be a list, got {values!r:.60}")
    if not values and not may_be_empty:
        raise UserError(f"{name}: the list is empty; give at least one")
    return values


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or (isinstance(value, float) and math.isfinite(value))
