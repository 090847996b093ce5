"""Canonical form: one tree for expressions that differ only by exact rewrites.

Every rewrite holds in floating point for every input, NaN and infinities included, at all widths and under both width
policies; the sign of a zero and the payload of a NaN may change. Bottom-up until nothing changes:

1. Operands of `add`, `mul` and `max` are sorted; the one holding wb1 comes first.
2. Nested `max` is flattened, repeated operands dropped, the rest joined as a balanced tree.
3. In one `max`, `relu(a)` absorbs `a`, `leaky_relu(a)` and `elu(a)`; `leaky_relu(a)` absorbs `a`; and members of `a`.
4. `relu(p)`, `leaky_relu(p)` and `elu(p)` are `p` where p is never negative (NaN allowed).
5. `relu(leaky_relu(a))` and `relu(elu(a))` are `relu(a)`; `relu2` of these or of `relu(a)` is `relu2(a)`.
6. `identity(a)` is `a`.

What these miss, `kernels.reference.fingerprint` finds numerically (docs/decisions/0003).
"""

from __future__ import annotations

from functools import lru_cache

from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression
from kernels.language.operators import LEAF, OPERATORS

_IDENTITY_ON_NON_NEGATIVE = frozenset({"relu", "leaky_relu", "elu"})
_ALWAYS_NON_NEGATIVE = frozenset({"relu", "sigmoid", "relu2", "softplus"})
_KEEPS_NON_NEGATIVE = frozenset({"leaky_relu", "elu", "tanh", "gelu", "gelu_erf", "swish"})
_UNDER_RELU = frozenset({"leaky_relu", "elu"})
_VANISHING_UNDER = {"relu": _UNDER_RELU, "relu2": _UNDER_RELU | {"relu"}}


@lru_cache(maxsize=EXPRESSIONS)
def canonicalize(expr: Expression) -> Expression:
    """Canonical form of `expr`: same value at every width and policy, equal for expressions the rules identify.

    Idempotent. The result need not obey a search space's rules (it may be lower than the minimal height); if wb1
    comes first in the text of `expr`, it does so in the result.
    """
    if expr.op == LEAF:
        return expr
    operands = tuple(canonicalize(a) for a in expr.args)
    if expr.weight is not None:
        return Expression(expr.op, operands, expr.weight)
    if expr.op == "max":
        return _max_of(operands)
    if OPERATORS[expr.op].arity == 2:
        return Expression(expr.op, tuple(sorted(operands, key=_order)))
    return _activation(expr.op, operands[0])


def _activation(op: str, operand: Expression) -> Expression:
    if op in _IDENTITY_ON_NON_NEGATIVE and _non_negative(operand):
        return operand
    if op == "identity":
        return operand
    if operand.op in _VANISHING_UNDER.get(op, ()):
        return _activation(op, operand.args[0])
    return Expression(op, (operand,))


def _max_of(operands: tuple[Expression, ...]) -> Expression:
    """Canonical `max` of canonical operands."""
    members = {m for a in operands for m in _members(a)}
    absorbed = set()
    for m in members:
        if m.op in ("relu", "leaky_relu"):
            inner = m.args[0]
            absorbed.add(inner)
            if m.op == "relu":
                absorbed.update(Expression(op, (inner,)) for op in _UNDER_RELU)
            absorbed.update(_members(inner))
    return _join(sorted(members - absorbed, key=_order))


def _members(expr: Expression) -> list[Expression]:
    """Operands of a `max` set; the expression itself if it is no `max`."""
    return [m for a in expr.args for m in _members(a)] if expr.op == "max" else [expr]


def _join(members: list[Expression]) -> Expression:
    if len(members) == 1:
        return members[0]
    half = (len(members) + 1) // 2
    return Expression("max", (_join(members[:half]), _join(members[half:])))


def _non_negative(expr: Expression) -> bool:
    """Whether every element of the value is known to be >= 0 or NaN, at all widths and under both policies."""
    if expr.op in _ALWAYS_NON_NEGATIVE:
        return True
    if expr.op in _KEEPS_NON_NEGATIVE:
        return _non_negative(expr.args[0])
    if expr.op in ("add", "mul", "max"):
        a, b = expr.args
        if expr.op == "mul" and a == b:
            return True
        known = (_non_negative(a), _non_negative(b))
        # One side is enough for max, unless padding lets the other side show alone.
        return all(known) or (expr.op == "max" and any(known) and _width_class(a) == _width_class(b))
    return False


def _width_class(expr: Expression) -> str:
    """`H`, `d`, or `mixed` (min or max of the two): equal classes mean equal widths at all H, d and policies."""
    if expr.op == LEAF:
        return "H"
    if expr.weight is not None:
        return "d" if expr.weight == "wb1" else "H"
    classes = {_width_class(a) for a in expr.args}
    return classes.pop() if len(classes) == 1 else "mixed"


def _order(expr: Expression) -> tuple[bool, int, str]:
    """Total order of operands: wb1 first, then small before large, then by text."""
    text = str(expr)
    return ("wb1" not in text, expr.size, text)
