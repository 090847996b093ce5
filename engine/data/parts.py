"""A step's batch, cut over ranks and micro-batches so that the sum of the parts' losses is the loss of the whole.

Each term of the distillation loss is a mean over something of its own: real tokens (hidden states), pairs of real
tokens of one sequence (attention scores), sequences (prediction). A part's term times the part's share of those counts,
summed over the parts, is the term of the whole batch, exactly but for rounding. The plain mean of the parts' losses is
not: the part with the shorter sequences would weigh too much.

Rows are dealt out in turn (part j of n takes rows j, j + n, ...): batches come sorted by length, so all parts get about
as many tokens. Every rank cuts the same batch, which is cheap on the host, and keeps its own parts; counts of the whole
need no communication. Parts keep the width of the whole, because the published arithmetic counts padding.

Rejected: a sampler per rank, as `torch.utils.data.DistributedSampler`. N ranks would then see other batches than one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch

from engine.data.batching import Batch


@dataclass(frozen=True)
class Part:
    """Some rows of a step's batch.

    Attributes:
        batch: the rows, padded as the whole batch is.
        tokens: share of the whole batch's real tokens, in 0..1.
        pairs: share of its pairs of real tokens, the sum over sequences of their length squared.
        rows: share of its sequences.
        whole: whether this is the whole batch; all shares are then 1.
        last: whether this is the rank's last part of the step.
    """

    batch: Batch
    tokens: float = 1.0
    pairs: float = 1.0
    rows: float = 1.0
    whole: bool = True
    last: bool = True


def split(batch: Batch, *, rank: int = 0, ranks: int = 1, micro_batches: int = 1) -> list[Part]:
    """The parts of `batch` (on the host) that `rank` of `ranks` works through in one step.

    At most `micro_batches` of them, empty ones left out. A rank that gets no row gets the first row with shares of 0,
    since it must take part in summing the gradients.
    """
    count = ranks * micro_batches
    if count == 1:
        return [Part(batch)]
    lengths = batch.attention_mask.sum(dim=-1).double()
    every = torch.arange(len(batch))
    parts = []
    for number in range(micro_batches):
        rows = every[rank * micro_batches + number :: count]
        if len(rows):
            chosen = replace(batch.map(operator.itemgetter(rows)), part=number)
            tokens = float(lengths[rows].sum() / lengths.sum())
            pairs = float(lengths[rows].square().sum() / lengths.square().sum())
            parts.append(Part(chosen, tokens, pairs, len(rows) / len(batch), whole=False, last=False))
    if not parts:
        parts = [Part(batch.map(lambda tensor: tensor[:1]), 0.0, 0.0, 0.0, whole=False)]
    return [*parts[:-1], replace(parts[-1], last=True)]
