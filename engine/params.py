"""Parameter counts by formula, never by a typed-in table and without building a model.

With H hidden width, F = FFN width, d = int(r F) inner width, E embedding factor, V vocabulary, P positions, T token
types, H_t teacher width and n the stack of a layer:

    embedding, trigram (E given)  V E + T H + P H + (3 E H + H) + 2H
    embedding, full (E None)      V H + T H + P H + 2H
    attention, per layer          4 (H^2 + H) + 2H
    FFN, per layer                n (2 H d + d + H + 2H)
    fit_dense                     H_t (H + 1)

Pooler and task heads are not counted, as in the published numbers. Rejected: counting a model built on the meta
device; it costs milliseconds where the search needs microseconds, and hides the formula the budget is solved with.

Source: EfficientBERT (Dong et al., Findings of EMNLP 2021); the trigram embedding is MobileBERT's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from engine.errors import UserError

if TYPE_CHECKING:
    from engine.architecture import Architecture

MAX_SIZE = 1 << 24
"""Largest width, vocabulary or count a `ModelShape` accepts: far above any encoder, far below overflow elsewhere."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a student that the search does not change.

    Attributes:
        hidden_size: H.
        num_layers: L.
        ffn_size: F; a layer of ratio r has inner width int(r F).
        vocab_size: V.
        embedding_size: E of the factorized trigram embedding, None for a full embedding.
        max_positions: P.
        type_vocab: T.
        teacher_hidden_size: H_t of the projection `fit_dense`, None for no projection.

    Raises:
        UserError: a size is not a positive integer.
    """

    hidden_size: int
    num_layers: int
    ffn_size: int
    vocab_size: int = 30522
    embedding_size: int | None = 128
    max_positions: int = 512
    type_vocab: int = 2
    teacher_hidden_size: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None and name in ("embedding_size", "teacher_hidden_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise UserError(f"{name}: must be an integer from 1 to {MAX_SIZE}, got {value!r:.60}")


def inner_width(ratio: Fraction, ffn_size: int) -> int:
    """d = int(r F), in exact arithmetic.

    Raises:
        UserError: the width would be 0.
    """
    width = ratio.numerator * ffn_size // ratio.denominator
    if width < 1:
        raise UserError(f"ratio: {ratio} of ffn_size {ffn_size} leaves an inner width of 0; use a larger ratio")
    return width


def ffn_parameters(hidden: int, inner: int, stack: int) -> int:
    """Parameters of `stack` FFNs: two linear maps, and a LayerNorm each."""
    return stack * (2 * hidden * inner + inner + 3 * hidden)


def fixed_parameters(shape: ModelShape, fit_dense: bool = True) -> int:
    """Parameters that no search decision changes: embedding, attention blocks, `fit_dense`.

    `fit_dense=True` counts the projection if the shape has one (`teacher_hidden_size` given).
    """
    h = shape.hidden_size
    tables = (shape.type_vocab + shape.max_positions) * h + 2 * h
    if shape.embedding_size is None:
        embedding = shape.vocab_size * h + tables
    else:
        e = shape.embedding_size
        embedding = shape.vocab_size * e + tables + 3 * e * h + h
    attention = 4 * (h * h + h) + 2 * h
    projection = shape.teacher_hidden_size * (h + 1) if fit_dense and shape.teacher_hidden_size else 0
    return embedding + shape.num_layers * attention + projection


def count_shapes(shapes: Iterable[tuple[int, Fraction]], shape: ModelShape, *, fit_dense: bool = True) -> int:
    """Parameters of a student whose layers have these (stack, ratio); the expressions add none."""
    h = shape.hidden_size
    return fixed_parameters(shape, fit_dense) + sum(
        ffn_parameters(h, inner_width(ratio, shape.ffn_size), stack) for stack, ratio in shapes
    )


def count_parameters(arch: Architecture, shape: ModelShape, *, fit_dense: bool = True) -> int:
    """Parameters of the student `arch` of these sizes, `fit_dense` included where the shape has one.

    Raises:
        UserError: `arch` does not have the shape's number of layers.
    """
    if len(arch.layers) != shape.num_layers:
        raise UserError(
            f"layers: the architecture has {len(arch.layers)}, the model {shape.num_layers}; give one spec per layer"
        )
    return count_shapes(((layer.stack, layer.ratio) for layer in arch.layers), shape, fit_dense=fit_dense)
