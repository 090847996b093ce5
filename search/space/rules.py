"""The rules an expression must obey to be in the space, one function per rule.

Each takes an expression and the `Rules` and returns None, or one line that says what is broken:

    weights_once           wb1 and wb2 once each, wb1 first in the text
    known_operators        only operators and kinds of linear of the space
    no_nested_activation   no activation directly inside an activation
    no_nested_linear       no linear directly inside a linear
    distinct_operands      no binary operator on two identical operands (identical as trees)
    height_in_range        height (edges from the root to the deepest leaf) within the space's heights
    widths_fit             every linear gets the width it takes and the value is H wide, at *every* ratio of the space

Source: EfficientBERT (Dong et al., Findings of EMNLP 2021), section 3.2 and its published code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kernels.language.expression import Expression, ExpressionError
from kernels.language.operators import LEAF, LINEAR, OPERATORS, PAPER_BINARY, PAPER_UNARY
from kernels.language.widths import check_weights, validate

MIN_HEIGHT = 3
"""Lowest height an FFN body can have: two linears, never nested directly, over the leaf."""

MAX_HEIGHT = 12
"""Highest height a space may allow; the paper's is 7."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What the rules depend on.

    Attributes:
        hidden: H.
        inners: inner widths d of all ratios of the space.
        policy: width policy of binary operators, `"truncate"` or `"pad"`.
        activations, binaries: names of the operators allowed.
        min_height, max_height: heights allowed, both included.
        linears: kinds of linear allowed, `linear` and `kron`.
    """

    hidden: int
    inners: tuple[int, ...]
    policy: str = "truncate"
    activations: tuple[str, ...] = PAPER_UNARY
    binaries: tuple[str, ...] = PAPER_BINARY
    min_height: int = 3
    max_height: int = 7
    linears: tuple[str, ...] = (LINEAR,)


def weights_once(expr: Expression, rules: Rules) -> str | None:
    """wb1 and wb2 occur once each, wb1 first in the text."""
    try:
        check_weights(expr)
    except ExpressionError as error:
        return str(error)
    return None


def known_operators(expr: Expression, rules: Rules) -> str | None:
    """Every operator is one of the space's."""
    allowed = (LEAF, *rules.linears, *rules.activations, *rules.binaries)
    for node in expr.walk():
        if node.op not in allowed:
            return f"operator {node.op} is not in the space ({', '.join(allowed)})"
    return None


def no_nested_activation(expr: Expression, rules: Rules) -> str | None:
    """No activation has an activation as its operand."""
    for node in expr.walk():
        if is_activation(node) and is_activation(node.args[0]):
            return f"activation {node.args[0].op} stands directly inside activation {node.op}"
    return None


def no_nested_linear(expr: Expression, rules: Rules) -> str | None:
    """No linear has a linear as its operand."""
    for node in expr.walk():
        if node.weight is not None and node.args[0].weight is not None:
            return f"linear {node.args[0].weight} stands directly inside linear {node.weight}"
    return None


def distinct_operands(expr: Expression, rules: Rules) -> str | None:
    """No binary operator has two identical operands."""
    for node in expr.walk():
        if len(node.args) == 2 and node.args[0] == node.args[1]:
            return f"both operands of {node.op} are {node.args[0]}"
    return None


def height_in_range(expr: Expression, rules: Rules) -> str | None:
    """The height lies between the space's lowest and highest."""
    height = expr.height
    if rules.min_height <= height <= rules.max_height:
        return None
    return f"height {height} is outside {rules.min_height}..{rules.max_height}"


def widths_fit(expr: Expression, rules: Rules) -> str | None:
    """Widths fit at every inner width of the space; assumes `weights_once`."""
    for inner in rules.inners:
        try:
            validate(expr, rules.hidden, inner, rules.policy)
        except ExpressionError as error:
            return f"at hidden width {rules.hidden} and inner width {inner}: {error}"
    return None


RULES: tuple[Callable[[Expression, Rules], str | None], ...] = (
    weights_once,
    known_operators,
    no_nested_activation,
    no_nested_linear,
    distinct_operands,
    height_in_range,
    widths_fit,
)


def check(expr: Expression, rules: Rules) -> str | None:
    """The first rule `expr` breaks, as `name: what is broken`, or None for a valid expression."""
    for rule in RULES:
        broken = rule(expr, rules)
        if broken is not None:
            return f"{rule.__name__}: {broken}"
    return None


def is_activation(expr: Expression) -> bool:
    """Whether the root of `expr` is an activation (unary operator)."""
    row = OPERATORS.get(expr.op)
    return row is not None and row.arity == 1
