"""Rows of a task to an `EncodedDataset`, in bulk through the tokenizer.

Chosen: the tokenizer's own batch call with `longest_first` truncation, so that a row is encoded exactly as a
`transformers` pipeline encodes it later. Rejected: tokenizing each text alone and putting pairs together here; faster
where texts repeat, but a second implementation of every tokenizer's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset
from engine.data.encode_published import encode_pairs
from engine.data.rows import Rows
from engine.data.task import TaskSpec
from engine.data.tokenizing import BLOCK, check_max_length, pack, parallel_tokenizers, uses_token_types

_Ids = list[list[int]]


def encode_task(
    rows: Rows,
    spec: TaskSpec,
    tokenizer: Any,
    max_length: int,
    *,
    max_positions: int | None = None,
    stride: int | None = None,
    published: bool = False,
) -> EncodedDataset:
    """Tokenize `rows` with special tokens, cut to `max_length` tokens (pairs: the longer text first).

    How texts become sequences is for the kind of task to say (`TaskHead.encode`).

    Args:
        rows: texts in the order of `spec.text_columns`, and labels.
        spec: the task.
        tokenizer: a `transformers` tokenizer.
        max_length: most tokens of a row, special tokens included.
        max_positions: tokens the model has positions for; the tokenizer's own limit when None.
        stride: question answering: tokens by which windows overlap.
        published: cut pairs as EfficientBERT's published code does (`engine.data.encode_published`).

    Raises:
        UserError: `max_length` is above what the model or its tokenizer can take, or the tokenizer has no padding.
    """
    if len(rows.texts) != len(spec.text_columns):
        raise ValueError(f"{len(rows.texts)} text columns given, the task has {len(spec.text_columns)}")
    check_max_length(max_length, tokenizer, max_positions)
    return spec.head.encode(rows, spec, tokenizer, max_length, stride=stride, published=published)


def encode_texts(
    columns: Sequence[list[str]],
    labels: np.ndarray | None,
    tokenizer: Any,
    max_length: int,
    *,
    choices: int = 1,
    published: bool = False,
) -> EncodedDataset:
    """Tokenize sequences of one text or two.

    Args:
        columns: one list of texts, or two of the same length.
        labels: one per row.
        tokenizer, max_length, published: as of `encode_task`.
        choices: sequences per row, one after the other.
    """
    ids: list[np.ndarray] = []
    lengths: list[int] = []
    second: list[int] = []
    truncated = 0
    encode = _encode_fast if tokenizer.is_fast else _encode_any
    if published and tokenizer.is_fast and len(columns) == 2:
        encode = _encode_published
    with parallel_tokenizers():
        for start in range(0, len(columns[0]), BLOCK):
            block, types, cut = encode(tokenizer, [column[start : start + BLOCK] for column in columns], max_length)
            lengths.extend(map(len, block))
            ids.append(np.fromiter(chain.from_iterable(block), dtype=np.int32))
            second.extend(map(len, block) if types is None else map(_second_start, types))
            truncated += cut
    return pack(ids, lengths, second, labels, tokenizer, truncated=truncated, choices=choices)


def _encode_fast(tokenizer: Any, columns: list[list[str]], max_length: int) -> tuple[_Ids, _Ids | None, int]:
    """Token ids, token types and number of cut rows, from the tokenizer's own Rust object.

    `encode_batch_fast` gives the ids of the tokenizer's call without the character offsets: 1.6 times as fast.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    try:
        block = backend.encode_batch_fast(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)))
    finally:
        backend.no_truncation()
    types = [e.type_ids for e in block] if _has_second(tokenizer, columns) else None
    return [e.ids for e in block], types, sum(1 for e in block if e.overflowing)


def _encode_published(tokenizer: Any, columns: list[list[str]], max_length: int) -> tuple[_Ids, _Ids | None, int]:
    """The same for pairs, cut as the published code cuts them."""
    ids, types, cut = encode_pairs(tokenizer, columns, max_length)
    return ids, types if _has_second(tokenizer, columns) else None, cut


def _encode_any(tokenizer: Any, columns: list[list[str]], max_length: int) -> tuple[_Ids, _Ids | None, int]:
    """The same through the public call, for tokenizers written in Python."""
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    block = tokenizer(*columns, truncation="longest_first", max_length=max_length, **options)
    whole = tokenizer(*columns, truncation=False, **options)["input_ids"]
    cut = sum(len(a) > len(b) for a, b in zip(whole, block["input_ids"], strict=True))
    return block["input_ids"], block["token_type_ids"] if _has_second(tokenizer, columns) else None, cut


def _second_start(types: list[int]) -> int:
    """Where token type 1 begins; the row's length where it does not."""
    return types.index(1) if 1 in types else len(types)


def _has_second(tokenizer: Any, columns: list[list[str]]) -> bool:
    return len(columns) == 2 and uses_token_types(tokenizer)
