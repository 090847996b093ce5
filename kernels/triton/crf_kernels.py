"""The Triton kernels of the CRF scan (`kernels.triton.crf`): a program a sentence, from its first word to its last.

Transitions stay in registers as a BL x BL tile (BL: tags, rounded up to a power of two). A position is one tile of sums
alpha[i] + transitions[i, j], reduced over i (forward) or j (backward) by its maximum and, in the log semiring, a sum of
exponentials: exact for scores of any size, L² exponentials, of which a GPU has plenty. Rows are kept less their
largest; what was taken off is added up in float64. Tags past the last one have scores of -inf.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

MINUS_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def _finite(top):
    """0 where everything is forbidden."""
    return tl.where(top == MINUS_INFINITY, 0.0, top)


@triton.jit
def _transitions(transitions, n, BL: tl.constexpr):
    tags = tl.arange(0, BL)
    inside = (tags[:, None] < n) & (tags[None, :] < n)
    return tl.load(transitions + tags[:, None] * n + tags[None, :], mask=inside, other=MINUS_INFINITY)


@triton.jit
def _words(lengths, b, positions):
    return tl.minimum(tl.maximum(tl.load(lengths + b), 0), positions).to(tl.int32)


@triton.jit
def crf_scan_fwd_kernel(
    emissions, transitions, start, end, lengths, alpha, total, positions, n, BEST: tl.constexpr, BL: tl.constexpr
):
    """alpha [B, positions, n], whose rows past the end are left alone, and total [B] float64."""
    b = tl.program_id(0)
    words = _words(lengths, b, positions)
    tags = tl.arange(0, BL)
    inside = tags < n
    a = _transitions(transitions, n, BL)  # [i, j]
    row = tl.load(start + tags, mask=inside, other=MINUS_INFINITY)
    shift = tl.full((), 0.0, tl.float64)
    at = b.to(tl.int64) * positions * n + tags
    for k in range(words):
        own = tl.load(emissions + at, mask=inside, other=MINUS_INFINITY)
        top = _finite(tl.max(own, 0))
        shift += top.to(tl.float64)
        if k > 0:
            x = row[:, None] + a
            largest = tl.max(x, 0)
            if not BEST:
                largest = _finite(largest)
                largest += tl.log(tl.sum(tl.exp(x - largest[None, :]), 0))
            row = largest
        row += own - top
        top = _finite(tl.max(row, 0))
        shift += top.to(tl.float64)
        row -= top
        tl.store(alpha + at, row, mask=inside)
        at += n
    row += tl.load(end + tags, mask=inside, other=MINUS_INFINITY)
    largest = tl.max(row, 0)
    if not BEST:
        largest = _finite(largest)
        largest += tl.log(tl.sum(tl.exp(row - largest), 0))
    tl.store(total + b, tl.where(words > 0, shift + largest.to(tl.float64), 0.0))


@triton.jit
def crf_scan_bwd_kernel(
    emissions, transitions, end, lengths, alpha, marginals, pairs, positions, n, BL: tl.constexpr
):  # fmt: skip
    """Probabilities of tags [B, positions, n], rows past the end left alone, and counts of pairs [B, n, n]."""
    b = tl.program_id(0)
    words = _words(lengths, b, positions)
    tags = tl.arange(0, BL)
    inside = tags < n
    a = _transitions(transitions, n, BL)
    beta = tl.load(end + tags, mask=inside, other=MINUS_INFINITY)
    counts = tl.zeros((BL, BL), tl.float32)
    at = (b.to(tl.int64) * positions + words - 1) * n + tags
    present = tags < tl.where(words > 0, n, 0)
    last = tl.load(alpha + at, mask=present, other=MINUS_INFINITY) + beta
    e = tl.exp(last - _finite(tl.max(last, 0)))
    tl.store(marginals + at, e / tl.maximum(tl.sum(e, 0), 1e-30), mask=present)
    for _ in range(words - 1):
        own = tl.load(emissions + at, mask=inside, other=MINUS_INFINITY)
        after = own - _finite(tl.max(own, 0)) + beta
        at -= n
        before = tl.load(alpha + at, mask=inside, other=MINUS_INFINITY)
        y = a + after[None, :]
        joint = y + before[:, None]
        p = tl.exp(joint - _finite(tl.max(tl.max(joint, 1), 0)))
        sums = tl.sum(p, 1)
        share = 1.0 / tl.maximum(tl.sum(sums, 0), 1e-30)  # at least 1 unless all are forbidden
        counts += p * share
        tl.store(marginals + at, sums * share, mask=inside)
        top = _finite(tl.max(y, 1))
        beta = top + tl.log(tl.sum(tl.exp(y - top[:, None]), 1))
        beta -= _finite(tl.max(beta, 0))
    _store_pairs(pairs, counts, b, n, BL)


@triton.jit
def crf_path_kernel(transitions, end, lengths, alpha, path, pairs, positions, n, BL: tl.constexpr):
    """1 at the tags of the best sequence, from the alpha of the max semiring, and how often each follows each."""
    b = tl.program_id(0)
    words = _words(lengths, b, positions)
    tags = tl.arange(0, BL)
    inside = tags < n
    counts = tl.zeros((BL, BL), tl.float32)
    at = (b.to(tl.int64) * positions + words - 1) * n + tags
    following = tl.full((), -1, tl.int32)
    possible = tl.full((), 1.0, tl.float32)
    for k in range(words):
        column = tl.load(end + tags, mask=inside, other=MINUS_INFINITY)
        if k > 0:
            column = tl.load(transitions + tags * n + following, mask=inside, other=MINUS_INFINITY)
        scores = tl.load(alpha + at, mask=inside, other=MINUS_INFINITY) + column
        possible = tl.where(tl.max(scores, 0) == MINUS_INFINITY, 0.0, possible)
        tag = tl.argmax(scores, 0).to(tl.int32)
        tl.store(path + at, tl.where(tags == tag, possible, 0.0), mask=inside)
        pair = (tags[:, None] == tag) & (tags[None, :] == following)
        counts += tl.where(pair, possible, 0.0)
        following = tag
        at -= n
    _store_pairs(pairs, counts, b, n, BL)


@triton.jit
def _store_pairs(pairs, counts, b, n, BL: tl.constexpr):
    tags = tl.arange(0, BL)
    inside = (tags[:, None] < n) & (tags[None, :] < n)
    tl.store(pairs + b.to(tl.int64) * n * n + tags[:, None] * n + tags[None, :], counts, mask=inside)
