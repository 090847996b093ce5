"""The stack of FFNs of one layer, run at any stored or smaller shape.

The weights of a layer are stored once, at its largest stack and inner width; a subnet runs the first n FFNs with the
first d rows of `dense1` and the first d columns of `dense2`, as views. Rejected: copying the slices into smaller
modules per candidate, which costs memory and a second gradient buffer for every subnet, and unshares the weights.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from torch import Tensor, nn

from engine.student.configuration import FFNASConfig
from kernels.ops import fused_ffn_stack
from kernels.program import Program


class FFNPlan(NamedTuple):
    """How one layer runs its FFNs: the lowered expression, how many of the stack, and their inner width."""

    program: Program
    stack: int
    inner: int


class FFN(nn.Module):
    """Weights of one FFN, `LayerNorm(x + dropout(expression(x)))`: `dense1` [d, H], `dense2` [H, d], `layernorm`.

    The two linear layers are read as weights by `FFNStack` and never called.
    """

    def __init__(self, config: FFNASConfig, inner: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(config.hidden_size, inner)
        self.dense2 = nn.Linear(inner, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class FFNStack(nn.ModuleList):
    """The FFNs of one layer, one after the other, in one call of the fused op.

    Args:
        config: sizes, dropout and LayerNorm epsilon.
        plan: the stack and inner width to store.
    """

    def __init__(self, config: FFNASConfig, plan: FFNPlan) -> None:
        super().__init__(FFN(config, plan.inner) for _ in range(plan.stack))
        self.inner = plan.inner
        self.p_drop = float(config.hidden_dropout_prob)
        self.eps = config.layer_norm_eps

    def forward(self, x: Tensor, plan: FFNPlan) -> Tensor:
        """[B, S, H] to [B, S, H] through the first `plan.stack` FFNs at inner width `plan.inner`."""
        used = list(islice(self, plan.stack))
        w1, b1 = [ffn.dense1.weight for ffn in used], [ffn.dense1.bias for ffn in used]
        w2 = [ffn.dense2.weight for ffn in used]
        if plan.inner != self.inner:  # slicing to the full width would still cost a copy of the gradient
            w1, b1, w2 = [w[: plan.inner] for w in w1], [b[: plan.inner] for b in b1], [w[:, : plan.inner] for w in w2]
        return fused_ffn_stack(
            x,
            w1,
            b1,
            w2,
            [ffn.dense2.bias for ffn in used],
            [ffn.layernorm.weight for ffn in used],
            [ffn.layernorm.bias for ffn in used],
            plan.program,
            p_drop=self.p_drop if self.training else 0.0,
            eps=self.eps,
        )
