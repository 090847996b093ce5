"""A CRF's scores as one tensor, so that a model's answer to a batch is one tensor whatever its head.

[B, S, L] scores of tags at tokens, and below them L + 2 rows that are the same for all sequences: transitions [L, L],
scores of a first and of a last tag. A softmax head's answer has the S rows alone.

Rejected: transitions as an attribute of the model that losses look up. The teacher's answers are kept on disk, compared
with those of models that are gone, and computed for several candidates at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

Transitions = tuple[Tensor, Tensor, Tensor]
"""Scores of a tag (column) after another (row) [L, L], of a first and of a last tag [L]."""


def packed(emissions: Tensor, transitions: Transitions) -> Tensor:
    """[B, S + L + 2, L]."""
    pairs, start, end = transitions
    rows = torch.cat([pairs, start[None], end[None]]).to(emissions.dtype)
    return torch.cat([emissions, rows.expand(len(emissions), -1, -1)], dim=1)


def unpacked(answer: Tensor, tokens: int) -> tuple[Tensor, Transitions | None]:
    """Scores of tags [B, S, L] at S tokens, and the transitions, None of a softmax head."""
    if answer.shape[1] == tokens:
        return answer, None
    rows = answer[0, tokens:]
    return answer[:, :tokens], (rows[:-2], rows[-2], rows[-1])


def rows_of(tokens: int, tags: int, *, crf: bool) -> int:
    """Rows of an answer."""
    return tokens + (tags + 2) * crf
