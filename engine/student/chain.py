"""A CRF's scores as one tensor, so that a model's answer to a batch is one tensor whatever its head.

[B, S, L] scores of tags at tokens, and below them L + 2 rows that are the same for all sequences: transitions [L, L],
scores of a first and of a last tag. A softmax head's answer has the S rows alone.

Rejected: transitions as an attribute of the model that losses look up. The teacher's answers are kept on disk, compared
with those of models that are gone, and computed for several candidates at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.crf.ops import Chain, decode

Transitions = tuple[Tensor, Tensor, Tensor]
"""Scores of a tag (column) after another (row) [L, L], of a first and of a last tag [L]."""


def packed(emissions: Tensor, transitions: Transitions) -> Tensor:
    """[B, S + L + 2, L]."""
    pairs, start, end = transitions
    rows = torch.cat([pairs, start[None], end[None]]).to(emissions.dtype)
    return torch.cat([emissions, rows.expand(len(emissions), -1, -1)], dim=1)


def unpacked(answer: Tensor, tokens: int) -> tuple[Tensor, Transitions | None]:
    """Scores of tags [B, S, L] at S tokens, and the transitions, None of a softmax head.

    Raises:
        ValueError: an answer to another number of tokens.
    """
    if answer.shape[1] == tokens:
        return answer, None
    if answer.shape[1] != rows_of(tokens, answer.shape[2], crf=True):
        raise ValueError(f"an answer of {tuple(answer.shape)} is none to {tokens} tokens")
    rows = answer[0, tokens:]
    return answer[:, :tokens], (rows[:-2], rows[-2], rows[-1])


def rows_of(tokens: int, tags: int, *, crf: bool) -> int:
    """Rows of an answer."""
    return tokens + (tags + 2) * crf


def chain_of(answer: Tensor, places: Tensor) -> tuple[Chain, bool]:
    """Scores of the words alone, and whether the head is a CRF; a softmax is a chain whose transitions are 0.

    Args:
        answer: as `engine.student.chain` has it.
        places: [B, S] bool, tokens that words begin with.
    """
    emissions, transitions = unpacked(answer, places.shape[1])
    order = (~places).to(torch.uint8).argsort(dim=1, stable=True)
    emissions = emissions.gather(1, order[..., None].expand_as(emissions))
    if emissions.dtype != torch.float64:
        emissions = emissions.float()
    lengths = places.sum(dim=1)
    if transitions is not None:
        return Chain(emissions, *transitions, lengths), True
    tags = emissions.shape[2]
    nothing = (emissions.new_zeros(tags, tags), emissions.new_zeros(tags), emissions.new_zeros(tags))
    return Chain(emissions, *nothing, lengths), False


def compact(values: Tensor, places: Tensor) -> Tensor:
    """[B, S] values of words one after the other, as `chain_of` has them."""
    return values.gather(1, (~places).to(torch.uint8).argsort(dim=1, stable=True))


def best_tags(answer: Tensor, places: Tensor) -> Tensor:
    """[B, S] int64 the best sequence's tags, words one after the other, -1 behind the last."""
    chain, is_chain = chain_of(answer, places)
    if is_chain:
        return decode(chain)[1]
    return torch.where(chain.mask(), chain.emissions.argmax(dim=-1), -1)
