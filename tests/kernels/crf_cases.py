"""Chains, and what enumerating all of their tag sequences says of them, for tests of the CRF scan."""

from __future__ import annotations

from itertools import pairwise, product

import torch

from kernels.crf.ops import Chain


def random_chain(batch, most, tags, *, seed=0, dtype=torch.float64, scale=1.0, lengths=None):
    """A chain with random scores; lengths from 0 to `most` unless given, the first one `most`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    if lengths is None:
        lengths = torch.randint(0, most + 1, (batch,), generator=generator)
        lengths[:1] = most
    else:
        lengths = torch.tensor(lengths)
    return Chain(draw(batch, most, tags), draw(tags, tags), draw(tags), draw(tags), lengths)


def sequences(chain, b):
    """All tag sequences of sentence b, [count, words], and their scores, [count], differentiable."""
    emissions, transitions, start, end, lengths = chain
    words = int(lengths[b])
    listed = list(product(range(len(start)), repeat=words))
    all_tags = torch.tensor(listed, dtype=torch.long).view(len(listed), words)
    scores = emissions.new_zeros(len(all_tags))
    if words:
        scores = start[all_tags[:, 0]] + end[all_tags[:, -1]]
    for k in range(words):
        scores = scores + emissions[b, k, all_tags[:, k]]
    for k in range(1, words):
        scores = scores + transitions[all_tags[:, k - 1], all_tags[:, k]]
    return all_tags, scores


def enumerated_log_z(chain):
    return torch.stack([torch.logsumexp(sequences(chain, b)[1], 0) for b in range(len(chain.lengths))])


def enumerated_marginals(chain):
    """tags [B, n, L] and pairs [B, L, L] by summing probabilities of whole sequences."""
    tags = torch.zeros_like(chain.emissions)
    pairs = chain.emissions.new_zeros(len(chain.lengths), *chain.transitions.shape)
    for b in range(len(chain.lengths)):
        all_tags, scores = sequences(chain, b)
        for y, p in zip(all_tags.tolist(), torch.softmax(scores, 0), strict=True):
            for k, tag in enumerate(y):
                tags[b, k, tag] += p
            for before, after in pairwise(y):
                pairs[b, before, after] += p
    return tags, pairs


def enumerated_divergence(teacher, student):
    """Per sentence the sum over all sequences of P_t log(P_t / P_s), differentiable in the student."""
    out = []
    for b in range(len(teacher.lengths)):
        log_t = torch.log_softmax(sequences(teacher, b)[1], 0)
        log_s = torch.log_softmax(sequences(student, b)[1], 0)
        out.append((log_t.exp() * (log_t - log_s)).sum())
    return torch.stack(out)


def to(chain, dtype):
    return Chain(*(t.to(dtype) for t in chain[:4]), chain.lengths)
