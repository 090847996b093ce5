"""Parameter counts by formula, never by a typed-in table and without building a model.

With H hidden width, F = FFN width, d = int(r F) inner width, E embedding factor, V vocabulary, P positions, T token
types, H_t teacher width and n the stack of a layer:

    embedding, trigram (E given)  V E + T H + P H + (3 E H + H) + 2H
    embedding, full (E None)      V H + T H + P H + 2H
    attention, per layer          4 (H^2 + H) + 2H
    FFN, per layer                n (w1 + w2 + d + H + 2H), w = H d for a full weight; a Kronecker product has
                                  (d/p) (H/q) + p q, with the block (p, q) of `kernels.kron_shape`
    fit_dense                     H_t (H + 1)

Pooler and task heads are not counted, as in the published numbers. Rejected: counting a model built on the meta
device; it costs milliseconds where the search needs microseconds, and hides the formula the budget is solved with.

Source: EfficientBERT (Dong et al., Findings of EMNLP 2021); the trigram embedding is MobileBERT's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from kernels import kron_shape
from kernels.expression import kron_weights
from kernels.kron_shape import Block, default_block
from kernels.operators import WEIGHTS

if TYPE_CHECKING:
    from engine.architecture import Architecture, LayerSpec

MAX_SIZE = 1 << 24
"""Largest width, vocabulary or count a `ModelShape` accepts: far above any encoder, far below overflow elsewhere."""

PAPER_RATIOS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))


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
        kron_block: (p, q) of weights that are Kronecker products; None takes the rule over F/1 .. F/4.

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
    kron_block: Block | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name == "kron_block":
                if value is not None:
                    object.__setattr__(self, name, parse_block(value))
                continue
            if value is None and name in ("embedding_size", "teacher_hidden_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise UserError(f"{name}: must be an integer from 1 to {MAX_SIZE}, got {value!r:.60}")

    @property
    def block(self) -> Block:
        """`kron_block`, or the rule's."""
        return self.kron_block or ruled_block(self.hidden_size, self.ffn_size)


def parse_block(value: Any) -> Block:
    """A Kronecker block (p, q) from a list or tuple of two positive integers. Raises `UserError`."""
    good = isinstance(value, (list, tuple)) and len(value) == 2
    if not good or any(isinstance(v, bool) or not isinstance(v, int) or not 1 <= v <= MAX_SIZE for v in value):
        raise UserError(f"kron_block: must be two positive integers [inner, hidden], got {_short(value)}")
    return value[0], value[1]


@lru_cache(maxsize=1024)
def ruled_block(hidden: int, ffn_size: int, ratios: tuple[Fraction, ...] = PAPER_RATIOS) -> Block:
    """The rule's block (`kernels.kron_shape`) for these ratios; ratios that leave no inner width are passed over."""
    inners = [r.numerator * ffn_size // r.denominator for r in ratios]
    return default_block(hidden, [d for d in inners if d] or [ffn_size])


def check_block(block: Block, hidden: int, inner: int) -> None:
    """Raises `UserError` unless the Kronecker block divides these widths."""
    try:
        kron_shape.check_block(block, hidden, inner)
    except ValueError as error:
        raise UserError(f"kron_block: {error}; give divisors of both") from error


def _short(value: Any) -> str:
    return "a list" if isinstance(value, (list, tuple, dict)) else f"{value!r:.60}"


def inner_width(ratio: Fraction, ffn_size: int) -> int:
    """d = int(r F), in exact arithmetic.

    Raises:
        UserError: the width would be 0.
    """
    width = ratio.numerator * ffn_size // ratio.denominator
    if width < 1:
        raise UserError(f"ratio: {ratio} of ffn_size {ffn_size} leaves an inner width of 0; use a larger ratio")
    return width


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
    """Parameters of a student whose layers have these (stack, ratio) and full weights; expressions add none then."""
    h = shape.hidden_size
    return fixed_parameters(shape, fit_dense) + sum(
        ffn_parameters(h, inner_width(ratio, shape.ffn_size), stack) for stack, ratio in shapes
    )


def count_parameters(arch: Architecture, shape: ModelShape, *, fit_dense: bool = True) -> int:
    """Parameters of the student `arch` of these sizes, `fit_dense` included where the shape has one.

    Raises:
        UserError: `arch` does not have the shape's number of layers, or its Kronecker weights cannot be factored.
    """
    if len(arch.layers) != shape.num_layers:
        raise UserError(
            f"layers: the architecture has {len(arch.layers)}, the model {shape.num_layers}; give one spec per layer"
        )
    return fixed_parameters(shape, fit_dense) + sum(layer_parameters(layer, shape) for layer in arch.layers)
