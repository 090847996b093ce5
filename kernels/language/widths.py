"""Width inference: how wide every node of an expression is, before anything runs.

With H the hidden width and d the inner width of a layer: `x` is H wide, `linear(., wb1)` takes H and gives d,
`linear(., wb2)` takes d and gives H, an activation keeps its operand's width, and a binary operator on unequal widths
follows the policy: `truncate` keeps the narrower (the leading columns of the wider operand), `pad` widens the narrower
with the operator's identity (add 0, mul 1, max -inf). d may be smaller or larger than H.

Rejected: finding shapes by running the expression on zeros (the published code). It needs weights, and reports a
broken candidate as a failed matrix product somewhere inside.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression, ExpressionError
from kernels.language.operators import LEAF, OPERATORS, WEIGHTS

POLICIES = ("truncate", "pad")


def infer_width(expr: Expression, hidden: int, inner: int, policy: str = "truncate") -> int:
    """Width of the value of `expr`.

    Args:
        expr: the expression; weights may occur any number of times.
        hidden: H, width of `x`, at least 1.
        inner: d, output width of `wb1`, at least 1.
        policy: `"truncate"` or `"pad"`.

    Raises:
        ExpressionError: a `linear` gets an operand of the wrong width (the message names the node and both widths),
            or `hidden`, `inner` or `policy` is not usable.
    """
    check_policy(policy)
    for name, value in (("hidden", hidden), ("inner", inner)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ExpressionError(f"{name} width must be a positive integer, got {value!r}")
    return _width(expr, hidden, inner, min if policy == "truncate" else max)


def check_policy(policy: str) -> None:
    """Raises `ExpressionError` unless `policy` is `"truncate"` or `"pad"`."""
    if policy not in POLICIES:
        raise ExpressionError(f"unknown width policy {policy!r}: use truncate or pad")


def weight_order(expr: Expression) -> list[str]:
    """Weights in the order in which they stand in the text of `expr`."""
    order = [w for operand in expr.args for w in weight_order(operand)]
    return [*order, expr.weight] if expr.weight is not None else order


@lru_cache(maxsize=EXPRESSIONS)
def check_weights(expr: Expression) -> None:
    """Raises `ExpressionError` unless wb1 and wb2 occur once each in `expr`, wb1 first in the text."""
    order = weight_order(expr)
    for weight in WEIGHTS:
        if order.count(weight) != 1:
            raise ExpressionError(f"{weight} occurs {order.count(weight)} times in {_short(expr)}: it must occur once")
    if order != list(WEIGHTS):
        raise ExpressionError(f"wb2 stands before wb1 in {_short(expr)}: wb1 must come first in the text")


def validate(expr: Expression, hidden: int, inner: int, policy: str = "truncate") -> None:
    """Raises `ExpressionError` unless `expr` can be an FFN body at these widths.

    That is: wb1 and wb2 occur once each, wb1 first in the text, every `linear` gets the width it takes, and the value
    is `hidden` wide. The rules of a search space (heights, forbidden nestings) are not checked here.
    """
    check_weights(expr)
    width = infer_width(expr, hidden, inner, policy)
    if width != hidden:
        raise ExpressionError(f"{_short(expr)} is {width} wide, but an FFN body must be {hidden} wide (hidden size)")


def _width(expr: Expression, hidden: int, inner: int, combine: Callable[[list[int]], int]) -> int:
    if expr.op == LEAF:
        return hidden
    widths = [_width(operand, hidden, inner, combine) for operand in expr.args]
    if expr.weight is not None:
        takes, gives = (hidden, inner) if expr.weight == "wb1" else (inner, hidden)
        if widths[0] != takes:
            raise ExpressionError(
                f"{_short(expr)}: {expr.weight} takes an operand {takes} wide,"
                f" but {_short(expr.args[0])} is {widths[0]} wide"
            )
        return gives
    return widths[0] if OPERATORS[expr.op].arity == 1 else combine(widths)


def _short(expr: Expression, limit: int = 100) -> str:
    text = str(expr)
    return text if len(text) <= limit else text[: limit - 3] + "..."
