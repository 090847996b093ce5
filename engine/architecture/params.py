"""Parameter counts by formula, without building a model.

With H hidden width, F = FFN width, d = int(r F) inner width, E embedding factor, V vocabulary, P positions, T token
types, H_t teacher width and n the stack of a layer; pooler and task heads are not counted, as in the published numbers:

    embedding, trigram (E given)  V E + T H + P H + (3 E H + H) + 2H
    embedding, factorized         the same with E in place of 3 E
    embedding, full (E None)      V H + T H + P H + 2H
    attention, per layer          3 (H a + a) + (a H + H) + 2H, a = H with all heads, h H / heads with the leading h;
                                  0 without heads, for there is no block then
    FFN, per layer                n (w1 + w2 + d + H + 2H), w = H d for a full weight; a Kronecker product has
                                  (d/p) (H/q) + p q, with the block (p, q) of `kernels.language.kron_shape`
    fit_dense                     H_t (H + 1)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fractions import Fraction
from typing import TYPE_CHECKING

from engine.architecture.shape import ModelShape, check_block, inner_width
from engine.errors import UserError
from kernels.language import kron_shape
from kernels.language.expression import kron_weights
from kernels.language.kron_shape import Block
from kernels.language.operators import WEIGHTS

if TYPE_CHECKING:
    from engine.architecture.architecture import Architecture, LayerSpec


def ffn_parameters(hidden: int, inner: int, stack: int, kron: Collection[str] = (), block: Block | None = None) -> int:
    """Parameters of `stack` FFNs: two linear maps, and a LayerNorm each.

    Args:
        hidden, inner, stack: H, d and n.
        kron: weights (`"wb1"`, `"wb2"`) that are Kronecker products.
        block: how they are factored; needed where there are some.

    Raises:
        UserError: the block does not divide the widths.
    """
    if not kron:
        return stack * (2 * hidden * inner + inner + 3 * hidden)
    assert block is not None
    check_block(block, hidden, inner)
    weights = sum(kron_shape.weight_size(name, kron, block, hidden, inner) for name in WEIGHTS)
    return stack * (weights + inner + 3 * hidden)


def layer_parameters(layer: LayerSpec, shape: ModelShape) -> int:
    """Parameters of one layer's FFNs. Raises `UserError` as `ffn_parameters`."""
    kron = kron_weights(layer.expression)
    inner = inner_width(layer.ratio, shape.ffn_size)
    return ffn_parameters(shape.hidden_size, inner, layer.stack, kron, shape.block if kron else None)


def attention_parameters(shape: ModelShape, heads: int | None = None) -> int:
    """Parameters of an attention block with so many heads, None for all. Raises `UserError`: there are not so many."""
    width = shape.attention_width(heads)
    return 4 * shape.hidden_size * width + 3 * width + 3 * shape.hidden_size if width else 0


def fixed_parameters(shape: ModelShape, fit_dense: bool = True) -> int:
    """Parameters that no search for FFNs changes: embedding, attention blocks with all heads, `fit_dense`.

    `fit_dense=True` counts the projection if the shape has one (`teacher_hidden_size` given).
    """
    h = shape.hidden_size
    tables = (shape.type_vocab + shape.max_positions) * h + 2 * h
    if shape.embedding_size is None:
        embedding = shape.vocab_size * h + tables
    else:
        embedding = shape.vocab_size * shape.embedding_size + tables + shape.embedding_inputs * h + h
    projection = shape.teacher_hidden_size * (h + 1) if fit_dense and shape.teacher_hidden_size else 0
    return embedding + shape.num_layers * attention_parameters(shape) + projection


def count_shapes(shapes: Iterable[tuple[int, Fraction]], shape: ModelShape, *, fit_dense: bool = True) -> int:
    """Parameters of a student whose layers have these (stack, ratio) and full weights; expressions add none then."""
    h = shape.hidden_size
    return fixed_parameters(shape, fit_dense) + sum(
        ffn_parameters(h, inner_width(ratio, shape.ffn_size), stack) for stack, ratio in shapes
    )


def count_parameters(arch: Architecture, shape: ModelShape, *, fit_dense: bool = True) -> int:
    """Parameters of the student `arch` of these sizes, `fit_dense` included where the shape has one.

    Raises:
        UserError: `arch` does not have the shape's number of layers, its Kronecker weights cannot be factored, or it
            names heads the shape does not have.
    """
    if len(arch.layers) != shape.num_layers:
        raise UserError(
            f"layers: the architecture has {len(arch.layers)}, the model {shape.num_layers}; give one spec per layer"
        )
    pruned = [layer.heads for layer in arch.layers if layer.heads is not None]
    return (
        fixed_parameters(shape, fit_dense)
        + sum(layer_parameters(layer, shape) for layer in arch.layers)
        + sum(attention_parameters(shape, heads) for heads in pruned)
        - len(pruned) * attention_parameters(shape)
    )
