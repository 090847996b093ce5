"""The plain-PyTorch reference of the FFN op: any expression, any floating dtype, gradients by autograd.

    ffn(x) = LayerNorm(x + dropout(expression(x)))          (bare: expression(x))

Every backend is checked against this code in float64, and falls back to it. It evaluates the tree node by node,
saves whatever autograd saves and is not meant to be fast. Rejected: composing the reference out of the lowered
program, because then a mistake in the lowering would be in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.language.expression import Expression
from kernels.language.operators import LEAF, OPERATORS
from kernels.language.widths import validate
from kernels.reference.philox import dropout


def evaluate(
    expr: Expression, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, policy: str = "truncate"
) -> Tensor:
    """Value of `expr`.

    Args:
        expr: a valid FFN body at these widths.
        x: [..., H], floating.
        w1, b1: [d, H] and [d]; `w1` may be a strided view. The weight of a `kron` is given as the whole product.
        w2, b2: [H, d] and [H].
        policy: width policy of binary operators, `"truncate"` or `"pad"`.

    Returns:
        [..., H], the dtype of the inputs.

    Raises:
        ExpressionError: `expr` is not valid at these widths.
        ValueError: a weight does not have the shape above.
    """
    hidden, inner = x.shape[-1], w1.shape[0]
    _check_shapes(hidden, inner, w1, b1, w2, b2)
    validate(expr, hidden, inner, policy)
    return evaluate_subtree(expr, x, {"wb1": (w1, b1), "wb2": (w2, b2)}, policy)


def evaluate_subtree(
    expr: Expression, x: Tensor, weights: dict[str, tuple[Tensor, Tensor]], policy: str = "truncate"
) -> Tensor:
    """Value of a subtree of an FFN body; `weights` gives (weight, bias) for `"wb1"` and `"wb2"`, at any widths."""

    def linear(weight: str) -> Callable[[Tensor], Tensor]:
        return lambda operand: F.linear(operand, *weights[weight])

    return evaluate_layers(expr, x, {name: linear(name) for name in weights}, policy)


def evaluate_layers(
    expr: Expression, x: Tensor, layers: Mapping[str, Callable[[Tensor], Tensor]], policy: str = "truncate"
) -> Tensor:
    """Value of `expr` with its two linear maps given as functions, `"wb1"` and `"wb2"`; each is called once per use."""
    if expr.op == LEAF:
        return x
    operands = [evaluate_layers(a, x, layers, policy) for a in expr.args]
    if expr.weight is not None:
        return layers[expr.weight](operands[0])
    row = OPERATORS[expr.op]
    if row.arity == 2:
        operands = _match_widths(operands, policy, row.identity)
    return row.forward(*operands)


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    expr: Expression,
    *,
    policy: str = "truncate",
    p_drop: float = 0.0,
    seed: int | None = None,
    eps: float = 1e-12,
    return_ln: bool = True,
) -> Tensor:
    """`LayerNorm(x + dropout(expr(x)))`, [..., H].

    Args:
        x, w1, b1, w2, b2, expr, policy: as in `evaluate`.
        ln_weight, ln_bias: [H]; may be None when `return_ln` is False.
        p_drop: probability of dropping an element of the expression's value; the mask is that of
            `kernels.reference.philox`.
        seed: 64-bit dropout seed; None draws one from torch's default CPU generator.
        eps: added to the variance, the BERT family's 1e-12 by default.
        return_ln: False returns the bare expression (no dropout, residual or LayerNorm).

    Raises:
        ExpressionError, ValueError: as in `evaluate`; also for `p_drop` outside [0, 1], `p_drop` with
            `return_ln=False`, or LayerNorm parameters missing.
    """
    if not return_ln and p_drop:
        raise ValueError(f"p_drop={p_drop} with return_ln=False: the bare expression has no dropout")
    value = evaluate(expr, x, w1, b1, w2, b2, policy)
    if not return_ln:
        return value
    if ln_weight is None or ln_bias is None:
        raise ValueError("ln_weight and ln_bias are needed unless return_ln=False")
    if p_drop:
        value = dropout(value, p_drop, draw_seed() if seed is None else seed)
    return F.layer_norm(x + value, (x.shape[-1],), ln_weight, ln_bias, eps)


def draw_seed() -> int:
    """A fresh 63-bit dropout seed from torch's default CPU generator, so `torch.manual_seed` governs it."""
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))


def _match_widths(operands: list[Tensor], policy: str, identity: float | None) -> list[Tensor]:
    widths = [a.shape[-1] for a in operands]
    if widths[0] == widths[1]:
        return operands
    if policy == "truncate":
        return [a[..., : min(widths)] for a in operands]
    return [
        a if n == max(widths) else F.pad(a, (0, max(widths) - n), value=identity)
        for a, n in zip(operands, widths, strict=True)
    ]


def _check_shapes(hidden: int, inner: int, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    expected = {"w1": (w1, (inner, hidden)), "b1": (b1, (inner,)), "w2": (w2, (hidden, inner)), "b2": (b2, (hidden,))}
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {shape} (hidden {hidden}, inner {inner})"
            )
