"""The scan of linear-chain CRFs in plain PyTorch, forward and backward in closed form: any device, float64 for checks.

Shapes: B sentences, n positions, L tags. The score of tags y of a sentence of m <= n words is

    start[y_1] + sum over k of emissions[k, y_k] + sum over k > 1 of transitions[y_{k-1}, y_k] + end[y_m]

`scan` adds (log semiring) or compares (max semiring) all L^m of them from left to right, `scan_bwd` from right to
left. Kept between the two is alpha alone: alpha[k, j] is the sum, or the best, over all ways to reach tag j at k, less
the largest of its row, so that rounding does not grow with the length.

What lies past a sentence's end is never read, whatever it holds. A score of -inf forbids a tag or a transition.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MOST_TAGS = 64
"""What kernels serve; more tags run here."""


def scan(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, best: bool
) -> tuple[Tensor, Tensor]:
    """Forward.

    Args:
        emissions: [B, n, L] float32 or float64.
        transitions: [L, L], from row to column; start, end: [L]. Same dtype.
        lengths: [B] int64, 0 <= lengths <= n.
        best: the max semiring instead of the log semiring.

    Returns:
        total [B] float64, the logarithm of the sum of the exponentials of all scores, or the best score; 0 for an empty
        sentence. alpha [B, n, L] in the emissions' dtype, 0 past the end.
    """
    batch, most, _ = emissions.shape
    alpha = torch.zeros_like(emissions, memory_format=torch.contiguous_format)
    shift = emissions.new_zeros(batch, dtype=torch.float64)
    row = torch.zeros_like(emissions[:, 0]) if most else emissions.new_zeros(batch, len(start))
    for k in range(most):
        own = emissions[:, k]
        reached = start + own if k == 0 else _reduce(row[:, :, None] + transitions, 1, best) + own
        top = _finite(reached.amax(-1))
        inside = k < lengths
        row = torch.where(inside[:, None], reached - top[:, None], row)
        shift = torch.where(inside, shift + top, shift)
        alpha[:, k] = torch.where(inside[:, None], row, 0.0)
    last = _reduce(row + end, -1, best)
    return torch.where(lengths > 0, last.double() + shift, 0.0), alpha


def scan_bwd(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, alpha: Tensor, best: bool
) -> tuple[Tensor, Tensor]:
    """Backward: arguments as for `scan`, with the alpha it gave.

    Returns:
        tags [B, n, L], the probability of every tag at every position, or in the max semiring 1 at the tags of the best
        sequence (of several, the one whose last tags have the lowest numbers); 0 past the end. pairs [B, L, L], the
        expected number of times that each tag follows each. All 0 where every sequence is forbidden.
    """
    del start
    if best:
        return _best_path(transitions, end, lengths, alpha)
    tags = torch.zeros_like(alpha)
    pairs = alpha.new_zeros(len(alpha), *transitions.shape)
    for k, beta, after in _backward(emissions, transitions, end, lengths):
        tags[:, k] = torch.where((k < lengths)[:, None], _softmax(alpha[:, k] + beta), 0.0)
        if after is not None:
            pairs += _pairs(alpha, transitions, after, lengths, k)
    return tags, pairs


def pair_marginals(
    emissions: Tensor, transitions: Tensor, start: Tensor, end: Tensor, lengths: Tensor, alpha: Tensor
) -> Tensor:
    """[B, n - 1, L, L] probabilities of every pair of neighbouring tags, 0 past the end; arguments as of `scan_bwd`."""
    del start
    batch, most, size = emissions.shape
    found = alpha.new_zeros(batch, max(0, most - 1), size, size)
    for k, _, after in _backward(emissions, transitions, end, lengths):
        if after is not None:
            found[:, k] = _pairs(alpha, transitions, after, lengths, k)
    return found


def _backward(
    emissions: Tensor, transitions: Tensor, end: Tensor, lengths: Tensor
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """From the last position to the first: its number, beta [B, L] there, the next one's emissions with its beta."""
    batch, most, size = emissions.shape
    beta = end.expand(batch, size)
    for k in reversed(range(most)):
        after = None
        if k < most - 1:
            inside = (k < lengths - 1)[:, None]
            after = torch.where(inside, emissions[:, k + 1], 0.0) + beta
            before = torch.logsumexp(transitions + after[:, None, :], -1)
            beta = torch.where(inside, before - _finite(before.amax(-1, keepdim=True)), end)
        yield k, beta, after


def _pairs(alpha: Tensor, transitions: Tensor, after: Tensor, lengths: Tensor, k: int) -> Tensor:
    """[B, L, L] probabilities of the tags at k and k + 1."""
    joint = alpha[:, k, :, None] + transitions + after[:, None, :]
    return torch.where((k < lengths - 1)[:, None, None], _softmax(joint.flatten(1)).view_as(joint), 0.0)


def _best_path(transitions: Tensor, end: Tensor, lengths: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    batch, most, size = alpha.shape
    tags, pairs = torch.zeros_like(alpha), alpha.new_zeros(batch, size, size)
    rows = torch.arange(batch, device=alpha.device)
    following = torch.zeros(batch, dtype=torch.long, device=alpha.device)
    possible = torch.zeros(batch, dtype=torch.bool, device=alpha.device)
    for k in reversed(range(most)):
        is_last, inside = lengths == k + 1, lengths > k + 1
        scores = alpha[:, k] + torch.where(is_last[:, None], end, transitions[:, following].T)
        possible = torch.where(is_last, scores.amax(-1) > -torch.inf, possible)
        tag = scores.argmax(-1)
        pairs[rows, tag, following] += (inside & possible).to(alpha.dtype)
        tags[rows, k, tag] = ((is_last | inside) & possible).to(alpha.dtype)
        following = tag
    return tags, pairs


def _reduce(scores: Tensor, dim: int, best: bool) -> Tensor:
    return scores.amax(dim) if best else torch.logsumexp(scores, dim)


def _finite(top: Tensor) -> Tensor:
    """0 where everything is forbidden."""
    return torch.where(top == -torch.inf, 0.0, top)


def _softmax(scores: Tensor) -> Tensor:
    """[B, ...] along the last dimension, 0 where all scores are -inf."""
    return torch.where((scores.amax(-1) == -torch.inf)[:, None], 0.0, torch.softmax(scores, -1))
