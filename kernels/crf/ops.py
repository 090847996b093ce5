"""Linear-chain CRFs: log Z, marginals, best sequences, and the exact divergence of one chain from another.

Shapes: B sentences, n positions, L tags. Computed in float32 (float64 for float64 emissions), whatever autocast says;
sums over a sentence are float64. What lies past a sentence's end is never read into a result. A score of -inf forbids a
tag or a transition. Forward and backward take O(n L²) time, and O(n L) memory is kept for backward
(`kernels.crf.registration`); up to 64 tags run on kernels.

    chain = Chain(emissions, transitions, start, end, lengths)
    loss = (log_partition(chain) - score(chain, tags)).sum()        negative log likelihood
    target = marginals(teacher)                                     n L + L² numbers and an entropy a sentence
    loss = divergence(chain, target).sum()                          KL(teacher || student) >= 0
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.crf import registration
from kernels.reference import crf as reference


class Chain(NamedTuple):
    """The scores of a linear-chain CRF for B sentences.

    Attributes:
        emissions: [B, n, L] score of every tag at every position.
        transitions: [L, L] score of a tag (column) after another (row).
        start, end: [L] score of a first and of a last tag.
        lengths: [B] int64 number of words of each sentence, 0 <= lengths <= n.
    """

    emissions: Tensor
    transitions: Tensor
    start: Tensor
    end: Tensor
    lengths: Tensor

    def divided(self, temperature: float) -> Chain:
        """The chain whose probabilities are these, flattened: all scores divided by the temperature.

        Raises:
            ValueError: the temperature is not positive.
        """
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if temperature == 1:
            return self
        emissions, transitions, start, end = (t / temperature for t in self[:4])
        return Chain(emissions, transitions, start, end, self.lengths)

    def mask(self) -> Tensor:
        """[B, n] bool, True at words."""
        return torch.arange(self.emissions.shape[1], device=self.lengths.device) < self.lengths[:, None]


class Marginals(NamedTuple):
    """What a chain says of its parts.

    Attributes:
        tags: [B, n, L] probability of every tag at every position, 0 past the end.
        pairs: [B, L, L] expected number of times that a tag (column) follows another (row).
        entropy: [B] float64, in nats.
    """

    tags: Tensor
    pairs: Tensor
    entropy: Tensor


def log_partition(chain: Chain) -> Tensor:
    """log Z: logarithm of the sum over all tag sequences of the exponential of their score. [B] float64, 0 if empty.

    Raises:
        ValueError: shapes do not fit.
    """
    return registration.crf_scan(*_checked(chain), False)[0]


def marginals(chain: Chain) -> Marginals:
    """Probabilities of tags and expected counts of pairs, and the entropy of the whole sequence; no gradients.

    Raises:
        ValueError: shapes do not fit.
    """
    with torch.no_grad():
        own = _checked(chain)
        log_z, alpha = registration.crf_scan(*own, False)
        tags, pairs = registration.crf_scan_bwd(*own, alpha, False)
        return Marginals(tags, pairs, log_z - expected_score(Chain(*own), tags, pairs))


def pair_marginals(chain: Chain) -> Tensor:
    """Probabilities [B, n - 1, L, L] of every pair of neighbouring tags, 0 past the end; no gradients.

    Plain PyTorch, L² numbers a position: for comparisons with arithmetic that needs each pair by itself.

    Raises:
        ValueError: shapes do not fit.
    """
    with torch.no_grad():
        own = Chain(*_checked(chain))
        return reference.pair_marginals(*own, registration.crf_scan(*own, False)[1])


def decode(chain: Chain) -> tuple[Tensor, Tensor]:
    """The best sequences (Viterbi): scores [B] float64, tags [B, n] int64, -1 past the end. No gradients.

    Of several best ones, that whose last tags have the lowest numbers; tags 0 where every sequence is forbidden.

    Raises:
        ValueError: shapes do not fit.
    """
    with torch.no_grad():
        own = _checked(chain)
        scores, alpha = registration.crf_scan(*own, True)
        path, _ = registration.crf_scan_bwd(*own, alpha, True)
        return scores, torch.where(chain.mask(), path.argmax(-1), -1)


def score(chain: Chain, tags: Tensor) -> Tensor:
    """Scores of given sequences, [B] float64; `tags` [B, n] int64, of any value past the end.

    Raises:
        ValueError: shapes do not fit.
    """
    emissions, transitions, start, end, lengths = _checked(chain)
    if tags.shape != emissions.shape[:2]:
        raise ValueError(f"crf: tags are {tuple(tags.shape)}, emissions {tuple(emissions.shape)}")
    if not tags.shape[1]:
        return emissions.new_zeros(len(lengths), dtype=torch.float64)
    mask = chain.mask()
    tags = torch.where(mask, tags, 0)
    own = torch.where(mask, emissions.gather(2, tags[..., None])[..., 0], 0.0)
    steps = torch.where(mask[:, 1:], transitions[tags[:, :-1], tags[:, 1:]], 0.0)
    last = tags.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    ends = torch.where(lengths > 0, start[tags[:, 0]] + end[last], 0.0)
    return own.sum(1, dtype=torch.float64) + steps.sum(1, dtype=torch.float64) + ends.double()


def expected_score(chain: Chain, tags: Tensor, pairs: Tensor) -> Tensor:
    """Mean score of a chain's sequences under the marginals of another one, [B] float64; gradients to the chain.

    Args:
        chain: whose scores.
        tags, pairs: as in `Marginals`. A probability of 0 meets a score of -inf, or of padding, as 0.
    """
    emissions, transitions, start, end, lengths = chain
    total = _weighted(tags, emissions).sum(1) + _weighted(pairs, transitions).sum(1)
    if not tags.shape[1]:
        return total
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, tags.shape[-1])
    return total + _weighted(tags[:, 0], start) + _weighted(tags.gather(1, last)[:, 0], end)


def divergence(student: Chain, target: Marginals) -> Tensor:
    """KL(target || student) of whole tag sequences, exact, [B] float64, >= 0; gradients to the student.

    Its gradient is the difference of marginals. A rounding error below 0 is returned as 0 with its gradient kept.

    Args:
        student: the chain to be moved.
        target: marginals of another chain over the same sentences and tags.

    Raises:
        ValueError: shapes do not fit.
    """
    own = Chain(*_checked(student))
    if target.tags.shape != own.emissions.shape:
        raise ValueError(f"crf: target is {tuple(target.tags.shape)}, emissions {tuple(own.emissions.shape)}")
    kl = log_partition(own) - expected_score(own, target.tags, target.pairs) - target.entropy
    return kl + (kl.clamp(min=0) - kl).detach().nan_to_num(0.0)


def _weighted(weights: Tensor, scores: Tensor) -> Tensor:
    """Sum over the last dimension, in float64, of weights times scores where the weights are not 0."""
    return torch.where(weights != 0, weights * scores, 0.0).sum(-1, dtype=torch.float64)


def _checked(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    emissions, transitions, start, end, lengths = chain
    if emissions.ndim != 3:
        raise ValueError(f"crf: emissions are {tuple(emissions.shape)}, must be [sentences, positions, tags]")
    batch, _, tags = emissions.shape
    for name, t, shape in (
        ("transitions", transitions, (tags, tags)), ("start", start, (tags,)), ("end", end, (tags,)),
        ("lengths", lengths, (batch,)),
    ):  # fmt: skip
        if t.shape != shape:
            raise ValueError(
                f"crf: {name} are {tuple(t.shape)}, must be {shape} for emissions {tuple(emissions.shape)}"
            )
    if lengths.dtype != torch.int64:
        raise ValueError(f"crf: lengths must be int64, got {lengths.dtype}")
    if tags < 1:
        raise ValueError("crf: there must be at least one tag")
    dtype = torch.float64 if emissions.dtype == torch.float64 else torch.float32
    return emissions.to(dtype), transitions.to(dtype), start.to(dtype), end.to(dtype), lengths
