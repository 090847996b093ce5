"""Structural distillation of taggers (Wang et al., ACL 2021, equations 5 to 9): the exact divergence of what a student
says of whole tag sequences from what its teacher says, whichever heads the two have.

A student's score is a sum over parts; its cross-entropy under the teacher needs the teacher's probabilities of those
parts alone:

    CRF to CRF          pairs of neighbouring tags, by forward and backward sums
    CRF to softmax      single tags, by the same sums
    softmax to CRF      pairs: products of the single tags' probabilities, since the teacher's tags are independent
    softmax to softmax  single tags

Temperature divides the scores of both, and the loss is multiplied by its square: targets are the marginals of a
distribution and the loss is a divergence, never negative. `paper_exact` tempers as the published code does: every
position's marginals of the teacher are raised to 1 / T and normalised by themselves, the student's scores are left
alone, the loss is their cross-entropy without T² and may be negative.

Losses are sums over sentences by words, so that a weight means the same for every head: of a softmax student it is the
mean divergence of a word. Words follow one another across what lies between them: `places` says where they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.data.results import Found
from engine.student.chain import chain_of, compact, packed, unpacked
from kernels.crf.ops import (
    Chain,
    Marginals,
    divergence,
    expected_score,
    log_partition,
    marginals,
    pair_marginals,
    score,
)

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset


def structural_loss(student: Tensor, teacher: Tensor, places: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher || student) of a batch per word, float32 scalar; 0 without words."""
    total = temperature**2 * divergences(student, teacher, places, temperature).sum()
    return (total / places.sum().clamp(min=1)).float()


def divergences(student: Tensor, teacher: Tensor, places: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of every sequence, [B] float64, >= 0; gradients to the student.

    Of a softmax student the sum over words of KL of single tags: the teacher's own dependence between tags, which such
    a student cannot have, is a constant and left out.
    """
    own, is_chain = chain_of(student, places)
    wanted, of_chain = chain_of(teacher.detach(), places)
    own, wanted = own.divided(temperature), wanted.divided(temperature)
    if is_chain:
        return divergence(own, marginals(wanted) if of_chain else independent(wanted))
    mask = own.mask()
    tags = marginals(wanted).tags if of_chain else _softmax(wanted.emissions, mask)
    return _tag_divergence(own.emissions, tags, mask)


def paper_loss(student: Tensor, teacher: Tensor, places: Tensor, temperature: float) -> Tensor:
    """The published arithmetic, the mean over sentences; see the module. float32 scalar."""
    own, is_chain = chain_of(student, places)
    wanted, of_chain = chain_of(teacher.detach(), places)
    mask = own.mask()
    with torch.no_grad():
        tags = _tempered(marginals(wanted).tags if of_chain else _softmax(wanted.emissions, mask), temperature)
        pairs = pair_marginals(wanted) if is_chain else None
        if pairs is not None:
            pairs = _tempered(pairs.flatten(2), temperature).view_as(pairs).sum(1)
    if pairs is None:
        log_p = F.log_softmax(torch.where(mask[..., None], own.emissions, 0.0), dim=-1)
        return (-(tags * log_p).sum(dim=(1, 2))).mean().float()
    return (log_partition(own) - expected_score(own, tags, pairs)).mean().float()


def independent(chain: Chain) -> Marginals:
    """Marginals of a chain without transitions, whose tags do not depend on each other."""
    mask = chain.mask()
    tags = _softmax(chain.emissions, mask)
    pairs = torch.einsum("bki,bkj->bij", tags[:, :-1], tags[:, 1:])
    logs = torch.where(mask[..., None], chain.emissions, 0.0).double().log_softmax(dim=-1)
    entropy = -torch.where(tags > 0, tags * logs, 0.0).sum(dim=(1, 2))
    return Marginals(tags, pairs, entropy)


def gold_loss(answer: Tensor, labels: Tensor, places: Tensor) -> Tensor:
    """Negative log-likelihood of the tags per word, float32 scalar; a CRF's leaves out sequences of which a tag is not
    known.

    Args:
        answer, places: as of `chain_of`.
        labels: [B, S] tags at words, negative where not known.
    """
    own, is_chain = chain_of(answer, places)
    tags = compact(labels, places)
    mask = own.mask()
    known = mask & (tags >= 0)
    if is_chain:
        whole = (known == mask).all(dim=1)
        loss = torch.where(whole, log_partition(own) - score(own, tags.clamp(min=0)), 0.0).sum()
        return (loss / (mask & whole[:, None]).sum().clamp(min=1)).float()
    emissions = torch.where(mask[..., None], own.emissions, 0.0)
    loss = F.cross_entropy(emissions.flatten(0, 1), torch.where(known, tags, -100).flatten(), reduction="sum")
    return loss / known.sum().clamp(min=1)


def word_places(data: EncodedDataset, rows: np.ndarray) -> tuple[Tensor, list[np.ndarray]]:
    """[B, S] bool the tokens at which a batch of rows answers words, and the words of each row by their number."""
    assert data.spans is not None
    starts = [data.spans.start[data.offsets[row] : data.offsets[row + 1]] for row in rows.tolist()]
    places = torch.zeros(len(rows), max(map(len, starts)), dtype=torch.bool)
    for k, start in enumerate(starts):
        places[k, : len(start)] = torch.from_numpy(start >= 0)
    return places, [start[start >= 0] for start in starts]


def of_sentences(data: EncodedDataset, found: Found) -> tuple[Tensor, Tensor]:
    """Scores at the words of every sentence, windows put together: [N, W (+ L + 2), L] and places [N, W] bool."""
    assert data.spans is not None
    counts = [text.count(" ") + 1 for text in data.spans.questions.texts[0]]
    scores, places, transitions = None, torch.zeros(len(counts), max(counts), dtype=torch.bool), None
    for rows, outputs in found:
        own, words = word_places(data, rows)
        emissions, transitions = unpacked(outputs, own.shape[1])
        if scores is None:
            scores = emissions.new_zeros(*places.shape, emissions.shape[-1])
        for row, here, at, given in zip(rows.tolist(), own, words, emissions, strict=True):
            sentence, numbers = int(data.spans.question[row]), torch.from_numpy(at.astype(np.int64))
            scores[sentence, numbers] = given[here]
            places[sentence, numbers] = True
    assert scores is not None
    return scores if transitions is None else packed(scores, transitions), places


def _tag_divergence(scores: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
    """[B] float64 sum over words of KL(tags || softmax(scores)).

    As a sum of t log(t / p) - t + p, none of which is negative, so that float32 marginals give no negative divergence.
    """
    log_p = F.log_softmax(torch.where(mask[..., None], scores, 0.0).double(), dim=-1)
    wanted = tags.double()
    each = torch.where(wanted > 0, wanted * (wanted.log() - log_p), 0.0) - wanted + log_p.exp()
    return torch.where(mask[..., None], each, 0.0).sum(dim=(1, 2))


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask[..., None], scores.softmax(dim=-1), 0.0)


def _tempered(p: Tensor, temperature: float) -> Tensor:
    """Every row raised to 1 / T and normalised; rows of 0 stay 0."""
    raised = p ** (1 / temperature)
    return raised / raised.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
