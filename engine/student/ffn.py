"""The stack of FFNs of one layer, run at any stored or smaller shape.

The weights of a layer are stored once, at its largest stack and inner width; a subnet runs the first n FFNs with the
first d rows of `dense1` and the first d columns of `dense2`, as views. Rejected: copying the slices into smaller
modules per candidate, which costs memory and a second gradient buffer for every subnet, and unshares the weights.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from engine.student.configuration import FFNASConfig
from kernels.expression import Expression
from kernels.ops import fused_ffn


class FFNPlan(NamedTuple):
    """How one layer runs its FFNs: the expression, how many of the stack, and their inner width."""

    expression: Expression
    stack: int
    inner: int


class FFN(nn.Module):
    """`LayerNorm(x + dropout(expression(x)))` with weights of inner width d_max.

    `dense1` is [d_max, H], `dense2` [H, d_max]; both are read as weights, never called.
    """

    def __init__(self, config: FFNASConfig, inner: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(config.hidden_size, inner)
        self.dense2 = nn.Linear(inner, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.policy = config.width_policy
        self.p_drop = float(config.hidden_dropout_prob)

    def forward(self, x: Tensor, expression: Expression, inner: int) -> Tensor:
        """[B, S, H] to [B, S, H] with the first `inner` of the stored inner width."""
        w1, b1, w2 = self.dense1.weight, self.dense1.bias, self.dense2.weight
        if inner != w1.shape[0]:
            w1, b1, w2 = w1[:inner], b1[:inner], w2[:, :inner]
        return fused_ffn(
            x,
            w1,
            b1,
            w2,
            self.dense2.bias,
            self.layernorm.weight,
            self.layernorm.bias,
            expression,
            policy=self.policy,
            p_drop=self.p_drop if self.training else 0.0,
            eps=self.layernorm.eps,
        )
