"""Sentences of words with tags to sequences of tokens, with a label at the first token of every word.

A sentence that is too long becomes windows of whole words that overlap; every word is labelled, and answered, in the
one window that shows most of what is around it, and stands in its neighbours as context only. So no word is lost and
none counts twice. A word of more tokens than a window has room for is cut.

Labels are NO_LABEL at what is no word's first token, and UNTAGGED at words whose tag is not known: the label says where
a model is to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset, Spans
from engine.data.rows import NO_LABEL, Rows
from engine.data.tags import UNTAGGED, words_of
from engine.data.tokenizing import pack, parallel_tokenizers
from engine.errors import UserError


def encode_tags(rows: Rows, tokenizer: Any, max_length: int, stride: int | None = None) -> EncodedDataset:
    """Tokenize sentences.

    Args:
        rows: texts of words parted by spaces, and `Tags` as golds, if known.
        tokenizer: a `transformers` tokenizer.
        max_length: most tokens of a sequence.
        stride: tokens by which windows of a long sentence overlap; None: a quarter of `max_length`.

    Raises:
        UserError: the stride leaves no room.
    """
    before, behind = _special(tokenizer)
    room = max_length - len(before) - len(behind)
    overlap = max_length // 4 if stride is None else stride
    if not 0 <= overlap < room:
        raise UserError(f"data.stride is {stride}: with data.max_length {max_length} choose at most {room - 1}")
    sentences = [words_of(text) for text in rows.texts[0]]
    pieces = _pieces(sentences, tokenizer, room)
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    starts: list[np.ndarray] = []
    owners: list[int] = []
    cut = 0
    for row, words in enumerate(sentences):
        tokens = [pieces[word] for word in words]
        tags = (UNTAGGED,) * len(words) if rows.golds is None else rows.golds[row].ids
        windows = windows_of([len(t) for t in tokens], room, overlap)
        cut += len(windows) > 1
        for first, last, owned in windows:
            inside = [token for word in tokens[first:last] for token in word]
            ids.append(np.array([*before, *inside, *behind], dtype=np.int32))
            start = np.full(len(ids[-1]), -1, dtype=np.int32)
            places = len(before) + np.cumsum([0, *(len(t) for t in tokens[first : last - 1])])
            own = np.arange(owned[0], owned[1])
            start[places[own - first]] = own
            label = np.full(len(start), NO_LABEL, dtype=np.int64)
            label[start >= 0] = np.asarray(tags, dtype=np.int64)[own]
            starts.append(start)
            labels.append(label)
            owners.append(row)
    lengths = [len(row) for row in ids]
    flat = np.concatenate(starts) if starts else np.empty(0, np.int32)
    spans = Spans(np.array(owners, dtype=np.int64), flat, flat + 1, rows)
    told = np.concatenate(labels) if labels else np.empty(0, np.int64)
    return pack(ids, lengths, lengths, told, tokenizer, truncated=cut, spans=spans, labels_per_token=True)


def windows_of(sizes: Sequence[int], room: int, overlap: int) -> list[tuple[int, int, tuple[int, int]]]:
    """Windows of a sentence: first word, the one behind the last, and those that it answers (first, behind the last).

    Args:
        sizes: tokens of each word, at most `room`.
        room: tokens of a window.
        overlap: tokens that neighbours share, about: whole words of them, and fewer where words are long.
    """
    ends = np.cumsum(sizes)
    begins = ends - np.asarray(sizes)
    spans: list[tuple[int, int]] = []
    first = 0
    while True:
        last = int(np.searchsorted(ends, begins[first] + room, side="right"))
        spans.append((first, last))
        if last == len(sizes):
            break
        first = max(first + 1, int(np.searchsorted(begins, ends[last - 1] - overlap)))
    windows, taken = [], 0
    for k, (first, last) in enumerate(spans):
        behind = last
        if k + 1 < len(spans):
            behind = (max(spans[k + 1][0], taken) + last + 1) // 2  # the middle of what both show
        windows.append((first, last, (taken, behind)))
        taken = behind
    return windows


def _special(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens before and behind a single text."""
    whole = list(tokenizer("a")["input_ids"])
    inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for at in range(len(whole)):
        if whole[at : at + len(inner)] == inner:
            return whole[:at], whole[at + len(inner) :]
    raise UserError(f"tokenizer {tokenizer.name_or_path!r}: its special tokens cannot be told: use another one")


def _pieces(sentences: Sequence[Sequence[str]], tokenizer: Any, room: int) -> dict[str, list[int]]:
    """Tokens of every word there is, at least one and at most `room`, as they are inside a sentence."""
    words = sorted({word for words in sentences for word in words})
    if not words:
        return {}
    spaced = _reads_spaces(tokenizer)
    with parallel_tokenizers():
        found = tokenizer([f" {w}" if spaced else w for w in words], add_special_tokens=False, truncation=False)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id is not None else tokenizer.pad_token_id
    return {word: (row or [unknown])[:room] for word, row in zip(words, found["input_ids"], strict=True)}


def _reads_spaces(tokenizer: Any) -> bool:
    """Whether a word has other tokens behind a space than at the beginning of a text, as RoBERTa's."""
    plain, spaced = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("word", " word"))
    return plain != spaced
