"""Plain text to sequences for warm-up distillation.

Each document is cut at sentence ends, tokenized, and its sentences are packed greedily into sequences of at most
`max_length` tokens, special tokens included. A sequence never crosses documents; a short document stays as it is; a
sentence longer than a sequence is cut hard.

Chosen: packing per document. Rejected: one endless stream cut every `max_length` tokens; no padding at all, but
attention runs across unrelated documents, and sentences are cut in the middle in nearly every sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset
from engine.data.encode import BLOCK, check_max_length, pack, parallel_tokenizers

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\s*\n\s*")


def split_sentences(document: str) -> list[str]:
    """Sentence-like pieces of a document: cut after `.`, `!`, `?` before white space, and at line ends.

    All but the first begin with one space, as byte-level tokenizers tell a word in a text from one at its start.
    """
    pieces = [piece for piece in _SENTENCE_END.split(document.strip()) if piece]
    return pieces[:1] + [f" {piece}" for piece in pieces[1:]]


def encode_text(
    texts: Iterable[str], tokenizer: Any, max_length: int, *, max_positions: int | None = None
) -> EncodedDataset:
    """Tokenize and pack documents into unlabelled sequences.

    Args:
        texts: documents; empty ones are left out.
        tokenizer: a `transformers` tokenizer.
        max_length: most tokens of a sequence, special tokens included.
        max_positions: tokens the model has positions for; the tokenizer's own limit when None.

    Raises:
        UserError: `max_length` is above what the model or its tokenizer can take.
    """
    check_max_length(max_length, tokenizer, max_positions)
    prefix, suffix = special_tokens(tokenizer)
    room = max_length - len(prefix) - len(suffix)
    blocks: list[np.ndarray] = []
    lengths: list[int] = []
    with parallel_tokenizers():
        for documents in _blocks(texts):
            flat: list[int] = []
            for sequence in _pack_documents(documents, tokenizer, room):
                flat += prefix
                flat += sequence
                flat += suffix
                lengths.append(len(prefix) + len(sequence) + len(suffix))
            blocks.append(np.asarray(flat, dtype=np.int32))
    return pack(blocks, lengths, lengths, None, tokenizer, truncated=0)


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids the tokenizer puts before and after a single text."""
    encoded = tokenizer("a", return_special_tokens_mask=True, return_attention_mask=False)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def _blocks(texts: Iterable[str]) -> Iterator[list[list[str]]]:
    """Documents as lists of sentences, gathered until a block has about `BLOCK` sentences."""
    block: list[list[str]] = []
    count = 0
    for text in texts:
        sentences = split_sentences(text)
        if not sentences:
            continue
        block.append(sentences)
        count += len(sentences)
        if count >= BLOCK:
            yield block
            block, count = [], 0
    if block:
        yield block


def _pack_documents(documents: list[list[str]], tokenizer: Any, room: int) -> Iterator[list[int]]:
    """Sequences of at most `room` tokens, without special tokens."""
    pieces = iter(_tokenize(list(chain.from_iterable(documents)), tokenizer))
    for sentences in documents:
        current: list[int] = []
        for _ in sentences:
            piece = next(pieces)
            if current and len(current) + len(piece) > room:
                yield current
                current = []
            while len(piece) > room:
                yield piece[:room]
                piece = piece[room:]
            current = current + piece
        if current:
            yield current


def _tokenize(sentences: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each sentence without special tokens."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return [e.ids for e in backend.encode_batch_fast(sentences, add_special_tokens=False)]
    return tokenizer(sentences, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
