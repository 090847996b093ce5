"""Floating-point operations of one forward pass by formula, 2 for each multiply-accumulate.

With H hidden width, d = int(r F) inner width, E embedding factor, S sequence length and n the stack of a layer, per
sequence:

    embedding, trigram          2 S 3E H          (without neighbours 2 S E H; full embedding: a look-up, 0)
    attention, per layer        2 S 4 H a + 4 S^2 a, a = H with all heads, h H / heads with the leading h
    FFN, per layer              n 2 S (w1 + w2), w = H d for a full weight; for a Kronecker product the multiply-
                                accumulates of its two small products, min(a2 b1 (b2 + a1), a1 b2 (a2 + b1))
    fit_dense (training only)   2 S H H_t

Only matrix products are counted, as in the published numbers: no biases, activations, LayerNorms or softmax (under 3 %
of the operations of a BERT-base layer), no pooler and no task head. A test compares the formula with
`torch.utils.flop_counter` on the plain model, which cannot look into fused ops and costs a forward pass.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from engine.architecture.shape import ModelShape, check_block, inner_width
from engine.errors import UserError
from kernels.language.expression import kron_weights
from kernels.language.kron_shape import Block, weight_products
from kernels.language.operators import WEIGHTS

if TYPE_CHECKING:
    from engine.architecture.architecture import Architecture, LayerSpec

PAPER_LENGTH = 128
"""Sequence length of the published counts."""


def ffn_flops(
    hidden: int,
    inner: int,
    stack: int,
    length: int = PAPER_LENGTH,
    kron: Collection[str] = (),
    block: Block | None = None,
) -> int:
    """Operations of `stack` FFNs on one sequence; `kron` and `block` as in `params.ffn_parameters`."""
    if not kron:
        return stack * 4 * length * hidden * inner
    assert block is not None
    check_block(block, hidden, inner)
    return stack * 2 * length * sum(weight_products(name, kron, block, hidden, inner) for name in WEIGHTS)


def layer_flops(layer: LayerSpec, shape: ModelShape, length: int = PAPER_LENGTH) -> int:
    """Operations of one layer's FFNs on one sequence."""
    kron = kron_weights(layer.expression)
    inner = inner_width(layer.ratio, shape.ffn_size)
    return ffn_flops(shape.hidden_size, inner, layer.stack, length, kron, shape.block if kron else None)


def attention_flops(shape: ModelShape, length: int = PAPER_LENGTH, heads: int | None = None) -> int:
    """Operations of an attention block with so many heads, None for all. Raises `UserError`: there are not so many."""
    return 4 * length * (2 * shape.hidden_size + length) * shape.attention_width(heads)


def fixed_flops(shape: ModelShape, length: int = PAPER_LENGTH, *, fit_dense: bool = False) -> int:
    """Operations that no search for FFNs changes, on one sequence; `fit_dense` counts one use of the projection."""
    h = shape.hidden_size
    embedding = 2 * length * shape.embedding_inputs * h
    projection = 2 * length * h * shape.teacher_hidden_size if fit_dense and shape.teacher_hidden_size else 0
    return embedding + shape.num_layers * attention_flops(shape, length) + projection


def count_flops(arch: Architecture, shape: ModelShape, length: int = PAPER_LENGTH, *, fit_dense: bool = False) -> int:
    """Operations of the student `arch` of these sizes on one sequence of `length` tokens.

    Raises:
        UserError: `arch` does not have the shape's number of layers, names heads the shape does not have, or `length`
            is not positive.
    """
    if len(arch.layers) != shape.num_layers:
        raise UserError(
            f"layers: the architecture has {len(arch.layers)}, the model {shape.num_layers}; give one spec per layer"
        )
    if length < 1:
        raise UserError(f"length: must be a positive number of tokens, got {length}")
    pruned = [layer.heads for layer in arch.layers if layer.heads is not None]
    return (
        fixed_flops(shape, length, fit_dense=fit_dense)
        + sum(layer_flops(layer, shape, length) for layer in arch.layers)
        + sum(attention_flops(shape, length, heads) for heads in pruned)
        - len(pruned) * attention_flops(shape, length)
    )
