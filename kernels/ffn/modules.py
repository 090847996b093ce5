"""`FusedFFN` and `FusedFFNStack`: the fused op as `nn.Module`s.

    FusedFFN        dense1.weight [d, H], .bias [d]   dense2.weight [H, d], .bias [H]   layernorm.weight [H], .bias [H]
    FusedFFNStack   layers.0.<as above>  layers.1. ...

Parameters live in ordinary `nn.Linear` and `nn.LayerNorm` children; the op reads them there. A weight that the
expression makes a `kron` is stored as two factors, `dense1.a` and `dense1.b` (`KronLinear`). A child that is more than
its plain class (adapters, hooks, quantization: `kernels.readable`) is called instead, in plain PyTorch
(docs/decisions/0011).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import readable
from kernels.ffn.called import Layers, called_ffn
from kernels.ffn.kron import KronWeight, Weight, kron_linear
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import GELU_FFN, Expression, kron_weights, parse_expression
from kernels.language.kron_shape import Block, default_block, factor_shapes
from kernels.language.lowering import lower
from kernels.language.operators import WEIGHTS


class Parameters(NamedTuple):
    """The parameters of one FFN, in the order of `kernels.ffn.ops.fused_ffn`; no LayerNorm's for a bare expression."""

    w1: Weight
    b1: Tensor
    w2: Weight
    b2: Tensor
    ln_weight: Tensor | None
    ln_bias: Tensor | None


@readable.register
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

    def forward(self, x: Tensor) -> Tensor:
        """[..., a2 b2] -> [..., a1 b1]."""
        rows = kron_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return rows.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{list(self.a.shape)} x {list(self.b.shape)}"


@readable.register
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

    def forward(self, x: Tensor, seed: int | Tensor | None = None, *, stream: int = 0) -> Tensor:
        """[..., H] -> [..., H]. `seed` fixes the dropout mask; None draws one from torch's default generator.

        `stream` is the position in a stack, for its masks under one seed.
        """
        parameters, norm = self.read(), self.layernorm
        p_drop = self.p_drop if self.training else 0.0
        if parameters is None or (stream and p_drop and seed is not None):
            first, second, policy = self.dense1, self.dense2, self.policy
            if parameters is None:
                readable.note("FusedFFN", dense1=first, dense2=second, layernorm=norm)
            layers = Layers(first, second, norm)
            return called_ffn(x, layers, self.expression, policy=policy, p_drop=p_drop, seed=seed, stream=stream)
        if norm is None:
            return fused_ffn(x, *parameters, self.expression, policy=self.policy, return_ln=False)
        return fused_ffn(x, *parameters, self.expression, policy=self.policy, p_drop=p_drop, seed=seed, eps=norm.eps)

    def read(self) -> Parameters | None:
        """What the fused op reads of the children; None where they must be called."""
        first, second, norm = self.dense1, self.dense2, self.layernorm
        if not readable.are_readable(first, second, norm):
            return None
        gamma, beta = (None, None) if norm is None else (norm.weight, norm.bias)
        found = Parameters(first.weight, first.bias, second.weight, second.bias, gamma, beta)
        return found if readable.are_tensors(*(found[:4] if norm is None else found)) else None

    @property
    def function(self) -> tuple[object, ...]:
        """What two FFNs must have in common to run in one stack."""
        eps = None if self.layernorm is None else self.layernorm.eps
        return self.expression, self.policy, self.p_drop, self.training, eps

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

    def layer(weight: str, inputs: int, outputs: int) -> nn.Linear | KronLinear:
        if weight in kron:
            return KronLinear(factor_shapes(weight, block, hidden, inner), device, dtype)
        return nn.Linear(inputs, outputs, device=device, dtype=dtype)

    return layer(WEIGHTS[0], hidden, inner), layer(WEIGHTS[1], inner, hidden)


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
        expression = parse_expression(expression) if isinstance(expression, str) else expression
        self.layers = nn.ModuleList(
            FusedFFN(
                hidden, inner, expression, policy=policy, p_drop=p_drop, eps=eps, kron_block=kron_block,
                device=device, dtype=dtype,
            )
            for _ in range(stack)
        )  # fmt: skip

    def forward(self, x: Tensor, seed: int | Tensor | None = None) -> Tensor:
        """[..., H] -> [..., H]. Layer l drops with stream l of the seed."""
        stack = self._read()
        if stack is None:
            for stream, layer in enumerate(self.layers):
                x = layer(x, seed, stream=stream) if isinstance(layer, FusedFFN) else layer(x)
            return x
        first, eps, parameters = stack
        w1, b1, w2, b2, gamma, beta = map(list, zip(*parameters, strict=True))
        p_drop = first.p_drop if first.training else 0.0
        return fused_ffn_stack(
            x, w1, b1, w2, b2, gamma, beta, first.expression, policy=first.policy, p_drop=p_drop, seed=seed, eps=eps
        )

    def _read(self) -> tuple[FusedFFN, float, list[Parameters]] | None:
        """The first layer, its epsilon and every layer's parameters; None where one has to be called, or is unlike the
        first."""
        layers = [layer for layer in self.layers if isinstance(layer, FusedFFN)]
        if len(layers) < len(self.layers):
            return None
        if not (readable.are_readable(*layers) and readable.is_untouched(self.layers)):
            return None
        found = [own for own in (layer.read() for layer in layers) if own is not None]
        norm = layers[0].layernorm
        if len(found) < len(layers) or norm is None:
            return None
        alike = all(layer.function == layers[0].function for layer in layers[1:])
        return (layers[0], norm.eps, found) if alike else None
