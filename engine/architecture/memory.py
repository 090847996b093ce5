"""Peak activation memory of an inference pass by formula, without building a model.

Operators run one after the other, unfused, each writing a new tensor that is freed after its last use; expressions
depth first, left operand first; attention keeps no S x S scores. Fused kernels stay below that. In units of one token's
elements, with H hidden width, E embedding factor, d inner width; weights are not counted:

    embedding, trigram   5E at the concatenation, 3E + H at the projection   (factorized: E + H, or 2H; full: 2H)
    attention block      H + 4a: input, queries, keys, values, context; a = H with all heads, h H / heads with h
    FFN                  H for its input, held for the residual, and the most that is alive of its expression
    LayerNorm            3H: input, value, their sum

The peak is the largest of these times tokens times bytes per element; a stack of n FFNs needs what one needs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from engine.architecture.shape import ModelShape, inner_width
from kernels.bounded import EXPRESSIONS
from kernels.language.expression import Expression
from kernels.language.operators import LEAF
from kernels.language.widths import infer_width

if TYPE_CHECKING:
    from engine.architecture.architecture import Architecture, LayerSpec

MIB = 1 << 20


@lru_cache(maxsize=EXPRESSIONS)
def expression_live(expr: Expression, hidden: int, inner: int, policy: str = "truncate") -> int:
    """Most elements alive per token while an expression is evaluated, its value included, `x` not."""
    return _live(expr, hidden, inner, policy)[0]


def layer_live(layer: LayerSpec, shape: ModelShape, policy: str = "truncate") -> int:
    """Most elements alive per token in one layer's FFNs; its input alone where it has none."""
    h = shape.hidden_size
    if layer.stack == 0:
        return h
    return h + max(expression_live(layer.expression, h, inner_width(layer.ratio, shape.ffn_size), policy), 2 * h)


def fixed_live(shape: ModelShape) -> int:
    """Most elements alive per token in embedding and attention blocks, which no search for FFNs changes."""
    return max(_embedding_live(shape), attention_live(shape))


def attention_live(shape: ModelShape, heads: int | None = None) -> int:
    """Most elements alive per token in an attention block with so many heads, None for all; its input without any."""
    h, width = shape.hidden_size, shape.attention_width(heads)
    return max(h + 4 * width, 3 * h) if width else h


def _embedding_live(shape: ModelShape) -> int:
    h, e = shape.hidden_size, shape.embedding_size
    if e is None:
        return 2 * h
    return max(5 * e, 3 * e + h) if shape.trigram else max(e + h, 2 * h)


def peak_activation_bytes(
    arch: Architecture,
    shape: ModelShape,
    *,
    sequence_length: int = 128,
    batch_size: int = 1,
    bytes_per_element: int = 4,
    policy: str = "truncate",
) -> int:
    """Bytes of activations alive at the worst moment of a forward pass; see the module's text.

    Args:
        arch: the architecture.
        shape: sizes of the student.
        sequence_length, batch_size: S and B.
        bytes_per_element: 4 for float32, 2 for bfloat16.
        policy: width policy of binary operators.
    """
    attention = (attention_live(shape, heads) for heads in {layer.heads for layer in arch.layers})
    live = max(_embedding_live(shape), *attention, *(layer_live(layer, shape, policy) for layer in arch.layers))
    return live * batch_size * sequence_length * bytes_per_element


def _live(expr: Expression, hidden: int, inner: int, policy: str) -> tuple[int, int]:
    """(most alive while the value is made, size of the value); `x` is the caller's and costs nothing."""
    if expr.op == LEAF:
        return 0, 0
    width = infer_width(expr, hidden, inner, policy)
    most = held = 0
    for operand in expr.args:
        alive, size = _live(operand, hidden, inner, policy)
        most, held = max(most, held + alive), held + size
    if len(expr.args) == 2 and policy == "pad":
        # the narrower operand is copied into a wider one before the operator runs
        widths = [infer_width(operand, hidden, inner, policy) for operand in expr.args]
        if widths[0] != widths[1]:
            most = max(most, held + width)
            narrow = min((0, 1), key=lambda i: widths[i])
            held += width - _live(expr.args[narrow], hidden, inner, policy)[1]
    return max(most, held + width), width
