"""Plain text to sequences for warm-up distillation.

Each document is cut at sentence ends, tokenized, and its sentences are packed greedily into sequences of at most
`max_length` tokens, special tokens included. A sequence never crosses documents; a short document stays as it is; a
sentence longer than a sequence is cut hard.

Chosen: packing per document. Rejected: one endless stream cut every `max_length` tokens; no padding at all, but
attention runs across unrelated documents, and sentences are cut in the middle in nearly every sequence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset
from engine.data.pieces import Pieces
from engine.data.tokenizing import BLOCK, check_max_length, pack, parallel_tokenizers

_SENTENCE_END = re.compile(r"\s(?:(?<=[.!?]\s)\s*|(?<=[.!?][\"')\]]\s)\s*|(?<=\n)\s*|\s*\n\s*)")
"""White space behind a sentence, or with a line end in it; begins with white space, which is quick to search for."""


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
    packer = Packer(tokenizer, max_length)
    with parallel_tokenizers():
        blocks = [packer(documents) for documents in _blocks(texts)]
    lengths = np.concatenate([lengths for _, lengths in blocks]) if blocks else np.empty(0, np.int64)
    return pack([tokens for tokens, _ in blocks], lengths, lengths, None, tokenizer, truncated=0)


class Packer:
    """Documents to sequences of tokens, the same ones whatever documents are packed together.

    Args:
        tokenizer: a `transformers` tokenizer.
        max_length: most tokens of a sequence, special tokens included.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        prefix, suffix = special_tokens(tokenizer)
        self.prefix = np.array(prefix, dtype=np.int32)
        self.suffix = np.array(suffix, dtype=np.int32)
        self.room = max_length - len(prefix) - len(suffix)
        self.pieces = Pieces(tokenizer)

    def __call__(self, documents: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T] tokens of all sequences, special tokens included, and int64 [N] tokens of each.

        Args:
            documents: their sentences.
        """
        ids, lengths = self.pieces(list(chain.from_iterable(documents)))
        cuts = np.array(_cuts(documents, lengths.tolist(), self.room), dtype=np.int64)
        sizes = np.diff(cuts, prepend=0)
        before, around = len(self.prefix), len(self.prefix) + len(self.suffix)
        ends = np.cumsum(sizes + around)
        tokens = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int32)
        starts = ends - sizes - around
        for place, token in enumerate(self.prefix):
            tokens[starts + place] = token
        for place, token in enumerate(self.suffix):
            tokens[starts + before + sizes + place] = token
        tokens[np.repeat(starts + before - (cuts - sizes), sizes) + np.arange(len(ids))] = ids
        return tokens, sizes + around


def _cuts(documents: Sequence[Sequence[str]], lengths: list[int], room: int) -> list[int]:
    """Where sequences end in the tokens of all documents: greedy by sentences, never across documents."""
    cuts: list[int] = []
    position = sentence = 0
    for document in documents:
        start = position
        for _ in document:
            length = lengths[sentence]
            sentence += 1
            if position > start and position - start + length > room:
                cuts.append(position)
                start = position
            position += length
            while position - start > room:
                start += room
                cuts.append(start)
        if position > start:
            cuts.append(position)
    return cuts


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
