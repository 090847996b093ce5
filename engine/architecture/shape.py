"""Sizes of a student that the search does not change, and the widths and Kronecker blocks that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from engine.errors import UserError
from kernels.language import kron_shape
from kernels.language.kron_shape import Block, default_block

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
        embedding_size: E of the factorized embedding, None for a full embedding.
        max_positions: P.
        type_vocab: T.
        teacher_hidden_size: H_t of the projection `fit_dense`, None for no projection.
        kron_block: (p, q) of weights that are Kronecker products; None takes the rule over F/1 .. F/4.
        num_heads: attention heads of a layer that keeps all; needed by formulas for architectures that name heads.
        trigram: whether an embedding with a factor sees the neighbouring tokens (3E to H), or not (E to H).

    Raises:
        UserError: a size is not a positive integer, or `num_heads` does not divide `hidden_size`.
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
    num_heads: int | None = None
    trigram: bool = True

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if name == "kron_block":
                if value is not None:
                    object.__setattr__(self, name, parse_block(value))
                continue
            if value is None and name in ("embedding_size", "teacher_hidden_size", "num_heads"):
                continue
            if name == "trigram":
                if not isinstance(value, bool):
                    raise UserError(f"trigram: must be true or false, got {value!r:.60}")
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
                raise UserError(f"{name}: must be an integer from 1 to {MAX_SIZE}, got {value!r:.60}")
        if self.num_heads is not None and self.hidden_size % self.num_heads:
            raise UserError(f"num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}")

    def attention_width(self, heads: int | None) -> int:
        """Columns of queries, keys and values of a layer with so many heads; H for None, which is all of them.

        Raises:
            UserError: there are not so many heads, or `num_heads` is not known.
        """
        if heads is None:
            return self.hidden_size
        if self.num_heads is None:
            raise UserError("num_heads: is needed where layers keep some of the attention heads; give their number")
        if heads > self.num_heads:
            raise UserError(f"heads: {heads} are more than the model's num_heads {self.num_heads}; use at most those")
        return self.hidden_size // self.num_heads * heads

    @property
    def embedding_inputs(self) -> int:
        """Inputs of the map from token embeddings to H: 3E, E without neighbours, 0 for a full embedding."""
        return (self.embedding_size or 0) * (3 if self.trigram else 1)

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
    """The rule's block (`kernels.language.kron_shape`) for these ratios, without those that leave no inner width."""
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
