"""Texts as memory that the library reads. No NumPy: importing it takes longer than a first answer."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .description import NativeError

Text = str | tuple[str, str]
"""A text, or a pair of texts."""


class Batch(NamedTuple):
    """Texts of one pass, padded to the longest: int64, uint8 and int64 [rows, length]."""

    ids: array[int]
    mask: array[int]
    types: array[int]
    rows: int
    length: int

    def addresses(self) -> list[int | None]:
        """Of ids, mask and types."""
        return [a.buffer_info()[0] for a in (self.ids, self.mask, self.types)]


def load_tokenizer(file: Path | None, longest: int) -> Any:
    """A tokenizer that cuts texts after `longest` tokens.

    Raises:
        NativeError: there is none, or it cannot be read, or the library is missing.
    """
    if file is None or not file.is_file():
        name = "tokenizer.json" if file is None else file.name
        raise NativeError(f"texts: the model has no {name}; give ids to `run`")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise NativeError("texts: the tokenizers library is missing: pip install tokenizers") from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_padding()
        tokenizer.enable_truncation(longest)
    except Exception as error:  # whatever the library finds wrong with a file it does not type
        raise NativeError(f"{file}: not a tokenizer ({str(error)!r:.120}); export the model again") from error
    return tokenizer


def check_texts(texts: Iterable[Any]) -> None:
    """Raises NativeError where something is neither a text nor a pair of them."""
    for text in texts:
        if not isinstance(text, str) and not (isinstance(text, tuple) and len(text) == 2):
            raise NativeError(f"texts: must be strings or pairs of them, got {text!r:.60}")


def batches(encodings: Sequence[Any], size: int) -> Iterator[tuple[list[int], Batch]]:
    """Encodings of like length together, `size` at a time, with their places in what was given."""
    order = sorted(range(len(encodings)), key=lambda i: len(encodings[i].ids))
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        yield part, padded([encodings[i] for i in part])


def padded(encodings: Sequence[Any]) -> Batch:
    """Encodings as one batch."""
    length = max(len(e.ids) for e in encodings)
    ids, mask, types = array("q"), array("B"), array("q")
    for e in encodings:
        count = len(e.ids)
        rest = length - count
        ids.extend(e.ids)
        ids.frombytes(bytes(8 * rest))
        types.extend(e.type_ids)
        types.frombytes(bytes(8 * rest))
        mask.frombytes(b"\1" * count + bytes(rest))
    return Batch(ids, mask, types, len(encodings), length)


def softmax(scores: Iterable[float]) -> list[float]:
    """Probabilities of scores."""
    scores = list(scores)
    top = max(scores)
    e = [math.exp(v - top) for v in scores]
    total = sum(e)
    return [v / total for v in e]


def likeliest(names: Sequence[str], scores: Iterable[float]) -> dict[str, Any]:
    """`label` and `score`, its probability."""
    found = softmax(scores)
    best = max(range(len(found)), key=found.__getitem__)
    return {"label": names[best], "score": found[best]}
