"""Questions and contexts to windows of tokens that know which characters they stand for.

A context that is too long for its question is cut into windows that overlap by `stride` tokens; every window is a row.
An answer is labelled in the windows that hold it whole; all others point to the first token, "no answer here".

Chosen: the tokenizer's own overflow and character offsets. Rejected: cutting the context by white space before
tokenizing, as the first published code did; a gold answer inside a word ("1960" of "1960s") is then missed.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset, Spans
from engine.data.rows import Gold, Rows
from engine.data.tokenizing import BLOCK, pack, parallel_tokenizers
from engine.errors import UserError

MAX_QUESTION = 64
"""Most tokens of a question; BERT's published setting."""


def encode_spans(rows: Rows, tokenizer: Any, max_length: int, stride: int | None = None) -> EncodedDataset:
    """Tokenize (question, context) rows into windows.

    Args:
        rows: questions and contexts; with `golds`, windows are labelled by the first accepted answer.
        tokenizer: a fast `transformers` tokenizer (character offsets).
        max_length: most tokens of a window.
        stride: tokens by which neighbouring windows overlap; None: a quarter of `max_length`.

    Raises:
        UserError: the tokenizer gives no offsets, or the stride leaves no room.
    """
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} gives no character offsets: use one with tokenizer.json")
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    special = tokenizer.num_special_tokens_to_add(pair=True)
    room = max_length - special
    limit = min(MAX_QUESTION, room // 2)
    overlap = max_length // 4 if stride is None else stride
    if not 0 <= overlap < room - limit:
        raise UserError(f"data.stride is {stride}: with data.max_length {max_length} choose at most {room - limit - 1}")
    ids: list[np.ndarray] = []
    lengths, second, question, labels, starts, ends = [], [], [], [], [], []
    with parallel_tokenizers():
        for begin in range(0, len(rows), BLOCK // 8):
            chunk = slice(begin, begin + BLOCK // 8)
            asked = [_shorten(q, backend, limit) for q in rows.texts[0][chunk]]
            backend.enable_truncation(max_length, stride=overlap, strategy="only_second")
            try:
                encoded = backend.encode_batch(list(zip(asked, rows.texts[1][chunk], strict=True)))
            finally:
                backend.no_truncation()
            for row, first in enumerate(encoded, start=begin):
                for window in (first, *first.overflowing):
                    start, end = _characters(window)
                    ids.append(np.array(window.ids, dtype=np.int32))
                    lengths.append(len(window.ids))
                    types = window.type_ids
                    second.append(types.index(1) if 1 in types else len(types))
                    question.append(row)
                    starts.append(start)
                    ends.append(end)
                    if rows.golds is not None:
                        labels.append(_label(rows.golds[row], start, end))
    spans = Spans(
        np.array(question, dtype=np.int64),
        np.array(list(chain.from_iterable(starts)), dtype=np.int32),
        np.array(list(chain.from_iterable(ends)), dtype=np.int32),
        rows,
    )
    target = None if rows.golds is None else np.array(labels, dtype=np.int64).reshape(-1, 2)
    return pack(ids, lengths, second, target, tokenizer, truncated=0, spans=spans)


def _shorten(question: str, backend: Any, limit: int) -> str:
    """The question, or its first `limit` tokens as they stand in it."""
    encoded = backend.encode(question, add_special_tokens=False)
    return question if len(encoded.ids) <= limit else question[: encoded.offsets[limit - 1][1]]


def _characters(window: Any) -> tuple[np.ndarray, np.ndarray]:
    """[length] first character and the one behind the last, of tokens of the context; -1 and 0 elsewhere."""
    offsets = np.array(window.offsets, dtype=np.int32).reshape(-1, 2)
    inside = np.array([sequence == 1 for sequence in window.sequence_ids])
    return np.where(inside, offsets[:, 0], -1), np.where(inside, offsets[:, 1], 0)


def _label(gold: Gold, start: np.ndarray, end: np.ndarray) -> tuple[int, int]:
    """First and last token of the first accepted answer; (0, 0) where the window does not hold it whole."""
    if not gold.texts:
        return 0, 0
    first, behind = gold.starts[0], gold.starts[0] + len(gold.texts[0])
    inside = start >= 0
    begins = np.flatnonzero(inside & (start <= first) & (end > first))
    stops = np.flatnonzero(inside & (start < behind) & (end >= behind))
    if len(begins) == 0 or len(stops) == 0:
        return 0, 0
    return int(begins[0]), int(stops[-1])
