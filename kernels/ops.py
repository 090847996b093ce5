"""The fused FFN op: `LayerNorm(x + dropout(expression(x)))` in one call.

This version runs the plain-PyTorch reference on every device.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from kernels.expression import Expression, ExpressionError, parse_expression
from kernels.reference import ffn

_parse = lru_cache(maxsize=4096)(parse_expression)


def fused_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    program: str | Expression,
    *,
    policy: str = "truncate",
    p_drop: float = 0.0,
    seed: int | None = None,
    eps: float = 1e-12,
    return_ln: bool = True,
) -> Tensor:
    """`LayerNorm(x + dropout(program(x)))`, or the bare `program(x)` with `return_ln=False`.

    Args:
        x: [..., H], floating.
        w1, b1: [d, H] and [d]; may be strided views of wider weights.
        w2, b2: [H, d] and [H].
        ln_weight, ln_bias: [H].
        program: expression text or `kernels.Expression`.
        policy: width policy of binary operators, `"truncate"` or `"pad"`.
        p_drop, seed: dropout of the expression's value; see `kernels.philox` for the mask.
        eps: LayerNorm's epsilon.

    Returns:
        [..., H].

    Raises:
        ExpressionError: `program` is not an expression, or not valid at these widths.
        ValueError: wrong shapes or dropout arguments.
    """
    if isinstance(program, str):
        program = _parse(program)
    if not isinstance(program, Expression):
        raise ExpressionError(f"program must be expression text or an Expression, got {type(program).__name__}")
    return ffn(
        x, w1, b1, w2, b2, ln_weight, ln_bias, program,
        policy=policy, p_drop=p_drop, seed=seed, eps=eps, return_ln=return_ln,
    )  # fmt: skip
