"""An FFN whose layers are called rather than read: what a fused call would compute, as PyTorch code would write it.

For layers that have more to them than their weights (`kernels.readable`): adapters, parametrizations, hooks, other
classes. Rejected: merging an adapter into the weights before a fused call; it would have to know every kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from kernels.language.expression import Expression
from kernels.reference.ffn import evaluate_layers
from kernels.reference.philox import dropout

Layer = Callable[[Tensor], Tensor]


class Layers(NamedTuple):
    """What an FFN calls: the expression's linear maps `wb1` ([..., H] to [..., d]) and `wb2` ([..., d] to [..., H]),
    and the LayerNorm, None for the bare expression."""

    first: Layer
    second: Layer
    norm: Layer | None = None


def called_ffn(
    x: Tensor,
    layers: Layers,
    expression: Expression,
    *,
    policy: str = "truncate",
    p_drop: float = 0.0,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """`norm(x + dropout(expression(x)))`, or the bare expression without a norm.

    Args:
        x: [..., H].
        layers: what is called.
        expression: a valid FFN body at these widths.
        policy: width policy of binary operators.
        p_drop: probability of dropping an element of the expression's value.
        seed: of the mask of `kernels.reference.philox`; None takes PyTorch's own dropout.
        stream: position in a stack, for that mask.

    Returns:
        [..., H], the dtype of x.
    """
    value = evaluate_layers(expression, x, {"wb1": layers.first, "wb2": layers.second}, policy)
    if layers.norm is None:
        return value.to(x.dtype)
    if p_drop:
        value = F.dropout(value, p_drop) if seed is None else dropout(value, p_drop, int(seed), stream=stream)
    return layers.norm(x + value).to(x.dtype)
