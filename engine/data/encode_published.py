"""Pairs of texts cut as EfficientBERT's published code cuts them (`paper_exact`).

Both take tokens from the longer text until the pair fits; the published code takes from the second where both are as
long, the tokenizers library from the first: of 3 + 3 tokens with room for 5, 3 + 2 stay there and 2 + 3 here.

Chosen: the tokenizer's own tokens, shortening and template, with other lengths. Rejected: taking the published code's
tokenizer over; but for ties and Chinese characters (`engine.model_sources.load_tokenizer`) it does the same.
"""

from __future__ import annotations

from typing import Any


def kept_lengths(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that stay of texts of `first` and `second` tokens where `room` tokens fit."""
    if first + second <= room:
        return first, second
    kept = min(first, max(room - second, -(-room // 2)))
    return kept, room - kept


def encode_pairs(
    tokenizer: Any, columns: list[list[str]], max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Token ids, token types and number of cut rows of pairs; `columns` are the first and the second texts."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    sides = [backend.encode_batch_fast(column, add_special_tokens=False) for column in columns]
    ids, types, cut = [], [], 0
    for first, second in zip(*sides, strict=True):
        lengths = kept_lengths(len(first), len(second), room)
        if lengths != (len(first), len(second)):
            cut += 1
            first.truncate(lengths[0])
            second.truncate(lengths[1])
        pair = backend.post_process(first, second, True)
        ids.append(pair.ids)
        types.append(pair.type_ids)
    return ids, types, cut
