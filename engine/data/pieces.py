"""Token ids of many sentences, as flat arrays, faster than one tokenizer call can give them.

BERT's WordPiece tokenizers treat every run of characters between white space on its own: normalization works character
by character, words end at white space, and pieces never cross words. So each distinct run needs the tokenizer once;
afterwards its ids come from a table, and a block of text costs a split, a dictionary lookup per word and a few NumPy
calls. Runs are tokenized by the tokenizer itself, so results are its own, exactly. Sentences with control characters
that Python and the tokenizer see differently, and all other kinds of tokenizers, go through the tokenizer as they are.

One core of an Intel Xeon, WikiText-2, BERT's vocabulary: 0.4 M tokens/s through the tokenizer's batch call, several
times that through the table; `ffnas prepare` prints what it reached.

Rejected: our own WordPiece. It would be one more implementation of Unicode normalization to keep equal to theirs.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import numpy as np

MAX_WORDS = 1 << 21
"""Distinct runs the table holds before it is emptied, about 300 MB."""

_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")
"""Characters that `str.split` and BERT's clean-up may see differently."""


class Pieces:
    """Tokenizes sentences without special tokens.

    Args:
        tokenizer: a `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.by_word = _splits_at_white_space(tokenizer)
        self._ids: np.ndarray
        self._starts: np.ndarray
        self._lengths: np.ndarray
        self._forget()

    def __call__(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T] ids of all sentences end to end, and int64 [len(sentences)] tokens of each."""
        if not self.by_word:
            return _flat(self._encode(sentences))
        strange = [i for i, sentence in enumerate(sentences) if _ODD.search(sentence)]
        skipped = set(strange)
        words = [[] if i in skipped else sentence.split() for i, sentence in enumerate(sentences)]
        flat = list(chain.from_iterable(words))
        self._learn(flat)
        numbers = np.fromiter(map(self._numbers.__getitem__, flat), dtype=np.int64, count=len(flat))
        lengths = self._lengths[numbers]
        ids = _gather(self._ids, self._starts[numbers], lengths)
        counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
        ends = np.concatenate([[0], np.cumsum(lengths)])[np.concatenate([[0], np.cumsum(counts)])]
        per_sentence = np.diff(ends)
        if not strange:
            return ids, per_sentence
        return self._with_strange(ids, ends, per_sentence, strange, [sentences[i] for i in strange])

    def _with_strange(
        self, ids: np.ndarray, ends: np.ndarray, per_sentence: np.ndarray, strange: list[int], sentences: list[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same with the ids of the sentences at `strange` put in."""
        encoded = self._encode(sentences)
        parts, last = [], 0
        for place, own in zip(strange, encoded, strict=True):
            parts += [ids[last : ends[place]], np.array(own, dtype=np.int32)]
            per_sentence[place] = len(own)
            last = ends[place]
        return np.concatenate([*parts, ids[last:]]), per_sentence

    def _learn(self, words: list[str]) -> None:
        """Puts words that are not in the table into it."""
        new = [word for word in dict.fromkeys(words) if word not in self._numbers]
        if len(self._numbers) + len(new) > MAX_WORDS:
            self._forget()
            new = list(dict.fromkeys(words))
        if not new:
            return
        ids, lengths = _flat(self._encode(new))
        self._numbers.update(zip(new, range(len(self._numbers), len(self._numbers) + len(new)), strict=True))
        self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])

    def _forget(self) -> None:
        self._numbers: dict[str, int] = {}
        self._ids = np.empty(0, np.int32)
        self._starts = np.empty(0, np.int64)
        self._lengths = np.empty(0, np.int64)

    def _encode(self, sentences: list[str]) -> list[list[int]]:
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            backend = tokenizer.backend_tokenizer
            backend.no_padding()
            backend.no_truncation()
            return [e.ids for e in backend.encode_batch_fast(sentences, add_special_tokens=False)]
        return tokenizer(sentences, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _splits_at_white_space(tokenizer: Any) -> bool:
    """Whether the tokenizer treats runs between white space independently: BERT's, with plain added tokens."""
    if not tokenizer.is_fast:
        return False
    backend = tokenizer.backend_tokenizer
    kinds = tuple(type(part).__name__ for part in (backend.normalizer, backend.pre_tokenizer, backend.model))
    added = tokenizer.added_tokens_decoder.values()
    plain = not any(t.lstrip or t.rstrip or t.single_word or len(t.content.split()) != 1 for t in added)
    return kinds == ("BertNormalizer", "BertPreTokenizer", "WordPiece") and plain


def _flat(encoded: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    return np.fromiter(chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum())), lengths


def _gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`values[starts[i] : starts[i] + lengths[i]]` of all i, end to end."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return values[np.repeat(starts - (ends - lengths), lengths) + np.arange(total)]
