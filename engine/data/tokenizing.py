"""What every use of a tokenizer shares: limits, blocks, threads, and packing of rows into a data set."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from engine.data.dataset import EncodedDataset, Spans
from engine.errors import UserError

_OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet", "data2vec-text"}


_PARALLELISM = "TOKENIZERS_PARALLELISM"


_USER_CHOICE = os.environ.get(_PARALLELISM)


BLOCK = 4096
"""Rows per call of the tokenizer: enough to use every core, small beside the encoded data set."""


_NO_LIMIT = 10**6
"""Tokenizers that know no limit report a huge number as `model_max_length`."""


def pack(
    ids: list[np.ndarray],
    lengths: list[int] | np.ndarray,
    second: list[int] | np.ndarray,
    labels: np.ndarray | None,
    tokenizer: Any,
    *,
    truncated: int,
    choices: int = 1,
    spans: Spans | None = None,
    labels_per_token: bool = False,
) -> EncodedDataset:
    """Build the data set from token blocks and row lengths."""
    if tokenizer.pad_token_id is None:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no padding token: set pad_token in its config")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return EncodedDataset(
        tokens=np.concatenate(ids).astype(np.int32) if ids else np.empty(0, np.int32),
        offsets=offsets,
        second=np.asarray(second, dtype=np.int32),
        labels=labels,
        pad_id=int(tokenizer.pad_token_id),
        uses_token_types=uses_token_types(tokenizer),
        truncated=truncated,
        choices=choices,
        spans=spans,
        labels_per_token=labels_per_token,
    )


def uses_token_types(tokenizer: Any) -> bool:
    """Whether the tokenizer's model takes `token_type_ids`."""
    return "token_type_ids" in tokenizer.model_input_names


def check_max_length(max_length: int, tokenizer: Any, max_positions: int | None = None) -> None:
    """Refuse sequences longer than the model has positions for.

    Raises:
        UserError: naming `max_length`, the limit and where it comes from.
    """
    limit, source = max_positions, "the model's positions"
    if limit is None and tokenizer.model_max_length < _NO_LIMIT:
        limit, source = int(tokenizer.model_max_length), "the tokenizer's limit"
    if limit is not None and max_length > limit:
        raise UserError(f"data.max_length is {max_length}, above {source} of {limit}: choose at most {limit}")
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length < special + 2:
        raise UserError(f"data.max_length is {max_length}: a pair alone needs {special + 2} tokens, choose more")


def model_positions(model_config: Any) -> int | None:
    """Tokens a Hugging Face model has positions for; None when its config does not say.

    RoBERTa and its kin number positions from `pad_token_id + 1`, so their tables hold that many rows more than tokens.
    """
    rows = getattr(model_config, "max_position_embeddings", None)
    if rows is None or rows < 1:
        return None
    offset = model_config.pad_token_id + 1 if model_config.model_type in _OFFSET_POSITIONS else 0
    return int(rows) - offset


@contextmanager
def parallel_tokenizers() -> Iterator[None]:
    """Let tokenizers use every core inside, and keep them quiet and safe in processes forked later.

    Unless the user has set `TOKENIZERS_PARALLELISM`: on inside, off afterwards. Left unset, a fork after the first
    parallel call prints a warning; left on, it can deadlock.
    """
    if _USER_CHOICE is not None:
        yield
        return
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = "false"
