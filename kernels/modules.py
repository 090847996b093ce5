"""`FusedFFN` and `FusedFFNStack`: the fused op as `nn.Module`s.

Parameters live in ordinary `nn.Linear` and `nn.LayerNorm` children, so initialization, state dicts, weight decay groups
and adapters by name work as they do for a hand-written FFN:

    FusedFFN        dense1.weight [d, H], .bias [d]   dense2.weight [H, d], .bias [H]   layernorm.weight [H], .bias [H]
    FusedFFNStack   layers.0.<as above>  layers.1. ...

The children hold the weights; their own `forward` is not called. Rejected: bare `nn.Parameter`s, which need their own
initialization and break code that looks for linear layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.expression import GELU_FFN, Expression, parse_expression
from kernels.lowering import lower
from kernels.ops import fused_ffn, fused_ffn_stack


class FusedFFN(nn.Module):
    """`LayerNorm(x + dropout(expression(x)))`, or the bare expression.

    Args:
        hidden: H, the width of input and output.
        inner: d, the intermediate width.
        expression: text or `kernels.Expression`; the plain GELU FFN by default.
        policy: width policy, "truncate" or "pad".
        p_drop: dropout of the expression's value in training mode.
        eps: LayerNorm's epsilon.
        layer_norm: False gives the bare expression (`p_drop` must then be 0).
        device, dtype: of the parameters.

    Raises:
        ExpressionError: the expression is not valid at these widths.
        ValueError: `p_drop` outside [0, 1], or given without LayerNorm.
    """

    def __init__(
        self,
        hidden: int,
        inner: int,
        expression: str | Expression = GELU_FFN,
        *,
        policy: str = "truncate",
        p_drop: float = 0.0,
        eps: float = 1e-12,
        layer_norm: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 <= p_drop <= 1.0:
            raise ValueError(f"p_drop must lie in [0, 1], got {p_drop!r}")
        if p_drop and not layer_norm:
            raise ValueError(f"p_drop={p_drop} without LayerNorm: the bare expression has no dropout")
        lower(expression, policy).check_widths(hidden, inner)
        self.expression = parse_expression(expression) if isinstance(expression, str) else expression
        self.policy = policy
        self.p_drop = p_drop
        self.dense1 = nn.Linear(hidden, inner, device=device, dtype=dtype)
        self.dense2 = nn.Linear(inner, hidden, device=device, dtype=dtype)
        self.layernorm = nn.LayerNorm(hidden, eps=eps, device=device, dtype=dtype) if layer_norm else None

    def forward(self, x: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H]. `seed` fixes the dropout mask; None draws one from torch's default generator."""
        norm = self.layernorm
        return fused_ffn(
            x,
            self.dense1.weight,
            self.dense1.bias,
            self.dense2.weight,
            self.dense2.bias,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            self.expression,
            policy=self.policy,
            p_drop=self.p_drop if self.training else 0.0,
            seed=seed,
            eps=1e-12 if norm is None else norm.eps,
            return_ln=norm is not None,
        )

    def extra_repr(self) -> str:
        return f"{self.expression}, policy={self.policy}, p_drop={self.p_drop}"


class FusedFFNStack(nn.Module):
    """`stack` FFNs with one expression, run as one op. Arguments as for `FusedFFN`; the children are `layers`."""

    def __init__(
        self,
        stack: int,
        hidden: int,
        inner: int,
        expression: str | Expression = GELU_FFN,
        *,
        policy: str = "truncate",
        p_drop: float = 0.0,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stack < 1:
            raise ValueError(f"stack must be at least 1, got {stack}")
        options = {"policy": policy, "p_drop": p_drop, "eps": eps, "device": device, "dtype": dtype}
        self.layers = nn.ModuleList(FusedFFN(hidden, inner, expression, **options) for _ in range(stack))

    def forward(self, x: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H]. Layer l drops with stream l of the seed."""
        layers = list(self.layers)
        first = layers[0]
        return fused_ffn_stack(
            x,
            [layer.dense1.weight for layer in layers],
            [layer.dense1.bias for layer in layers],
            [layer.dense2.weight for layer in layers],
            [layer.dense2.bias for layer in layers],
            [layer.layernorm.weight for layer in layers],
            [layer.layernorm.bias for layer in layers],
            first.expression,
            policy=first.policy,
            p_drop=first.p_drop if self.training else 0.0,
            seed=seed,
            eps=first.layernorm.eps,
        )
