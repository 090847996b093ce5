"""`FusedFFN` and `FusedFFNStack`: the fused op as `nn.Module`s.

Parameters live in ordinary `nn.Linear` and `nn.LayerNorm` children, so initialization, state dicts, weight decay groups
and adapters by name work as they do for a hand-written FFN:

    FusedFFN        dense1.weight [d, H], .bias [d]   dense2.weight [H, d], .bias [H]   layernorm.weight [H], .bias [H]
    FusedFFNStack   layers.0.<as above>  layers.1. ...

A weight that the expression makes a `kron` is stored as two factors, `dense1.a` and `dense1.b` (`KronLinear`).

The children hold the weights; their own `forward` is not called. Rejected: bare `nn.Parameter`s, which need their own
initialization and break code that looks for linear layers.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from kernels.ffn.kron import KronWeight, kron_linear, nearest_kron
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import GELU_FFN, Expression, kron_weights, parse_expression
from kernels.language.kron_shape import Block, default_block, factor_shapes
from kernels.language.lowering import lower
from kernels.language.operators import WEIGHTS


class KronLinear(nn.Module):
    """A linear map whose weight is a Kronecker product; parameters `a` [a1, a2], `b` [b1, b2] and `bias` [a1 b1].

    Args:
        shapes: of A and B (`kernels.language.kron_shape.factor_shapes`).
        device, dtype: of the parameters.

    Initialised so that the product has the variance of `nn.Linear`'s default, 1 / (3 a2 b2).
    """

    def __init__(
        self,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        (a1, a2), (b1, b2) = shapes
        self.in_features, self.out_features = a2 * b2, a1 * b1
        self.a = nn.Parameter(torch.empty(a1, a2, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(b1, b2, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(a1 * b1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, std: float | None = None) -> None:
        """Normal factors whose product has standard deviation `std`, and a zero bias; None as in the class's text."""
        factor = (self.in_features * 3) ** -0.25 if std is None else std**0.5
        nn.init.normal_(self.a, std=factor)
        nn.init.normal_(self.b, std=factor)
        nn.init.zeros_(self.bias)

    @property
    def weight(self) -> KronWeight:
        """The factors, as the ops of `kernels.ffn.ops` take them; `.whole()` is the matrix."""
        return KronWeight(self.a, self.b)

    def set_weight(self, weight: Tensor) -> None:
        """Sets the factors to those of the product nearest to `weight` [a1 b1, a2 b2]."""
        found = nearest_kron(weight, tuple(self.b.shape))
        with torch.no_grad():
            self.a.copy_(found.a)
            self.b.copy_(found.b)

    def forward(self, x: Tensor) -> Tensor:
        """[..., a2 b2] -> [..., a1 b1]."""
        rows = kron_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{list(self.a.shape)} x {list(self.b.shape)}"


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
        kron_block: how `kron` weights are factored; None takes the rule of `kernels.language.kron_shape`.
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
        kron_block: Block | None = None,
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
        block = kron_block or default_block(hidden, [inner])
        self.dense1, self.dense2 = dense_layers(
            kron_weights(self.expression), hidden, inner, block, device=device, dtype=dtype
        )
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


def dense_layers(
    kron: Collection[str],
    hidden: int,
    inner: int,
    block: Block,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[nn.Linear | KronLinear, nn.Linear | KronLinear]:
    """The two linear children of an FFN, those of the weights in `kron` factored by `block`.

    Raises:
        ValueError: a weight is to be factored, and the block does not divide the widths.
    """
    options = {"device": device, "dtype": dtype}
    first, second = (
        KronLinear(factor_shapes(weight, block, hidden, inner), **options)
        if weight in kron
        else nn.Linear(*((hidden, inner) if weight == "wb1" else (inner, hidden)), **options)
        for weight in WEIGHTS
    )
    return first, second


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
        kron_block: Block | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stack < 1:
            raise ValueError(f"stack must be at least 1, got {stack}")
        options = {"policy": policy, "p_drop": p_drop, "eps": eps, "kron_block": kron_block}
        options |= {"device": device, "dtype": dtype}
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
