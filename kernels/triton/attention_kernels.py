"""The Triton kernels of attention with its score loss (`kernels.triton.attention`): forward, and backward in two parts.

    s = scale q kᵀ,   t = scale_t q_t k_tᵀ,   P = exp(s - lse) over real keys,   context = dropout(P) v
    dP = (dcontext vᵀ) dropped alike,   ds = P (dP - <dcontext, context>) + (s - t) f at real pairs,   f = 2 g / pairs
    dq = scale ds k,   dk = scale dsᵀ q,   dv = dropout(P)ᵀ dcontext

A program has one head and a block of queries (forward, dq) or of keys (dk, dv), and meets the other side block by
block (Dao et al., FlashAttention, 2022, algorithms 1 and 4). Head sizes are padded to powers of two with zeros that are
masked, never stored. Everything is float32 between the products, whose operands have the inputs' dtype. Padded rows are
not read, but for queries, which attend like others.

LOSS_APART (float16): s - t is multiplied by k and q as it is, and scaled by f afterwards; f is about 1e-8 for a batch,
below what float16 holds.

Rejected: one backward kernel with atomic additions to dq. It saves the second computation of s, t and dP, a fourth of
the products, and gives other bits on every run.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.primitives import power_of_two

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_of(x, task, heads, stride_batch, stride_head):
    """Pointer to the head `task` = sample * heads + head."""
    return x + (task // heads).to(tl.int64) * stride_batch + (task % heads).to(tl.int64) * stride_head


@triton.jit
def tile_of(x, stride, rows, wanted, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """[rows, COLUMNS] of a head; 0 beyond WIDTH and in rows that are not wanted."""
    columns = tl.arange(0, COLUMNS)
    at = x + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=wanted[:, None] & (columns[None, :] < WIDTH), other=0.0)


@triton.jit
def store_tile(x, stride, rows, wanted, value, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.arange(0, COLUMNS)
    at = x + rows[:, None].to(tl.int64) * stride + columns[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=wanted[:, None] & (columns[None, :] < WIDTH))


@triton.jit
def real_tokens(mask, rows, length):
    """bool, by row: in the sequence and not padding."""
    return tl.load(mask + rows, mask=rows < length, other=0) != 0


@triton.jit
def _dropped(value, seed, task, rows, first, length, limit, drop_scale, BN: tl.constexpr):
    """`value` [rows, BN keys from `first`, a multiple of 4] with dropout's factors (`kernels.reference.philox`)."""
    row = task.to(tl.int64) * length + rows
    zeros = tl.zeros((1, BN // 4), tl.int32)
    low = (row & 0xFFFFFFFF).to(tl.uint32)[:, None] + zeros.to(tl.uint32)
    high = (row >> 32).to(tl.uint32)[:, None] + zeros.to(tl.uint32)
    group = (first // 4 + tl.arange(0, BN // 4))[None, :].to(tl.uint32) + tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, tl.zeros_like(low))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    kept = words > (limit.to(tl.int64) + 2147483648).to(tl.uint32)
    return tl.where(kept, value * drop_scale, 0.0)


@triton.jit
def attention_fwd_kernel(
    q, k, v, q_t, k_t, mask, seed, context, lse, parts,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s, o_b, o_h, o_s,
    heads, length, limit, scale, scale_t, drop_scale,
    D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BD_T: tl.constexpr,
    LOSS: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of queries, heads of samples). parts: float32 [heads of samples, blocks], sums of (s - t)²."""
    task = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < length
    mask_row = mask + (task // heads).to(tl.int64) * length
    q_tile = tile_of(head_of(q, task, heads, q_b, q_h), q_s, rows, inside, D, BD)
    k_head = head_of(k, task, heads, k_b, k_h)
    v_head = head_of(v, task, heads, v_b, v_h)
    if LOSS:
        real_q = real_tokens(mask_row, rows, length)
        qt_tile = tile_of(head_of(q_t, task, heads, qt_b, qt_h), qt_s, rows, real_q, D_T, BD_T)
        kt_head = head_of(k_t, task, heads, kt_b, kt_h)
        squares = tl.zeros((BM,), tl.float32)
    if DROPOUT:
        word = tl.load(seed)
    # On-line softmax: per query the largest score so far, the sum of exponentials, and the sum of values weighted by
    # them, [BM, BD]; all three are brought down whenever a larger score comes.
    maximum = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for first in range(0, length, BN):
        keys = first + tl.arange(0, BN)
        real = real_tokens(mask_row, keys, length)
        k_tile = tile_of(k_head, k_s, keys, real, D, BD)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        if LOSS:
            kt_tile = tile_of(kt_head, kt_s, keys, real, D_T, BD_T)
            t = tl.dot(qt_tile, tl.trans(kt_tile), input_precision=PRECISION) * scale_t
            difference = tl.where(real_q[:, None] & real[None, :], s - t, 0.0)
            squares += tl.sum(difference * difference, 1)
        s = tl.where(real[None, :], s, float("-inf"))
        highest = tl.maximum(maximum, tl.max(s, 1))
        offset = tl.where(highest == float("-inf"), 0.0, highest)  # no real key yet
        p = power_of_two((s - offset[:, None]) * LOG2_E)
        shrink = power_of_two((maximum - offset) * LOG2_E)
        total = total * shrink + tl.sum(p, 1)  # before dropout: the softmax's own denominator
        if DROPOUT:
            p = _dropped(p, word, task, rows, first, length, limit, drop_scale, BN)
        v_tile = tile_of(v_head, v_s, keys, real, D, BD)
        acc = acc * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        maximum = highest
    empty = total == 0.0  # a sample without real keys: context and lse are 0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    store_tile(head_of(context, task, heads, o_b, o_h), o_s, rows, inside, acc, D, BD)
    lse_row = tl.where(empty, 0.0, maximum + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse + task.to(tl.int64) * length + rows, lse_row, mask=inside)
    if LOSS:
        tl.store(parts + task * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, 0))


@triton.jit
def attention_bwd_q_kernel(
    grad, q, k, v, q_t, k_t, mask, seed, context, lse, delta, grad_loss, share, grad_q,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s, o_b, o_h, o_s,
    dq_b, dq_h, dq_s, heads, length, limit, scale, scale_t, drop_scale,
    D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BD_T: tl.constexpr,
    LOSS: tl.constexpr, LOSS_APART: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta [heads of samples, S] = <dcontext, context> for the other kernel. Grid as in forward."""
    task = tl.program_id(1)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < length
    at = task.to(tl.int64) * length + rows
    mask_row = mask + (task // heads).to(tl.int64) * length
    q_tile = tile_of(head_of(q, task, heads, q_b, q_h), q_s, rows, inside, D, BD)
    g_tile = tile_of(head_of(grad, task, heads, g_b, g_h), g_s, rows, inside, D, BD)
    o_tile = tile_of(head_of(context, task, heads, o_b, o_h), o_s, rows, inside, D, BD)
    # <dcontext, context> is the sum over keys of P dP, dropout or not: no pass over the scores for it.
    own = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + at, own, mask=inside)
    lse_row = tl.load(lse + at, mask=inside, other=0.0)
    k_head = head_of(k, task, heads, k_b, k_h)
    v_head = head_of(v, task, heads, v_b, v_h)
    if LOSS:
        factor = 2.0 * tl.load(grad_loss) * tl.load(share)
        real_q = real_tokens(mask_row, rows, length)
        qt_tile = tile_of(head_of(q_t, task, heads, qt_b, qt_h), qt_s, rows, real_q, D_T, BD_T)
        kt_head = head_of(k_t, task, heads, kt_b, kt_h)
    if LOSS_APART:
        apart = tl.zeros((BM, BD), tl.float32)
    if DROPOUT:
        word = tl.load(seed)
    acc = tl.zeros((BM, BD), tl.float32)
    for first in range(0, length, BN):
        keys = first + tl.arange(0, BN)
        real = real_tokens(mask_row, keys, length)
        k_tile = tile_of(k_head, k_s, keys, real, D, BD)
        v_tile = tile_of(v_head, v_s, keys, real, D, BD)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        p = tl.where(real[None, :], power_of_two((s - lse_row[:, None]) * LOG2_E), 0.0)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        if DROPOUT:
            dp = _dropped(dp, word, task, rows, first, length, limit, drop_scale, BN)
        ds = p * (dp - own[:, None])
        if LOSS:
            kt_tile = tile_of(kt_head, kt_s, keys, real, D_T, BD_T)
            t = tl.dot(qt_tile, tl.trans(kt_tile), input_precision=PRECISION) * scale_t
            difference = tl.where(real_q[:, None] & real[None, :], s - t, 0.0)
            if LOSS_APART:
                apart = tl.dot(difference.to(k_tile.dtype), k_tile, apart, input_precision=PRECISION)
            else:
                ds += difference * factor
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    if LOSS_APART:
        acc += apart * factor
    store_tile(head_of(grad_q, task, heads, dq_b, dq_h), dq_s, rows, inside, acc * scale, D, BD)


@triton.jit
def attention_bwd_kv_kernel(
    grad, q, k, v, q_t, k_t, mask, seed, lse, delta, grad_loss, share, grad_k, grad_v,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, heads, length, limit, scale, scale_t, drop_scale,
    D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BD_T: tl.constexpr,
    LOSS: tl.constexpr, LOSS_APART: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, 0 at padded keys; `delta` as the other kernel left it. Grid (blocks of keys, heads of samples)."""
    # Keys and values of this block stay, queries go by; scores are computed once more, transposed work by work: every
    # element of dk and dv has one program, which adds its queries in order.
    task = tl.program_id(1)
    first = tl.program_id(0) * BN
    keys = first + tl.arange(0, BN)
    mask_row = mask + (task // heads).to(tl.int64) * length
    real = real_tokens(mask_row, keys, length)
    k_tile = tile_of(head_of(k, task, heads, k_b, k_h), k_s, keys, real, D, BD)
    v_tile = tile_of(head_of(v, task, heads, v_b, v_h), v_s, keys, real, D, BD)
    q_head = head_of(q, task, heads, q_b, q_h)
    g_head = head_of(grad, task, heads, g_b, g_h)
    base = task.to(tl.int64) * length
    if LOSS:
        factor = 2.0 * tl.load(grad_loss) * tl.load(share)
        kt_tile = tile_of(head_of(k_t, task, heads, kt_b, kt_h), kt_s, keys, real, D_T, BD_T)
        qt_head = head_of(q_t, task, heads, qt_b, qt_h)
    if LOSS_APART:
        apart = tl.zeros((BN, BD), tl.float32)
    if DROPOUT:
        word = tl.load(seed)
    acc_k = tl.zeros((BN, BD), tl.float32)
    acc_v = tl.zeros((BN, BD), tl.float32)
    for start in range(0, length, BM):
        rows = start + tl.arange(0, BM)
        inside = rows < length
        q_tile = tile_of(q_head, q_s, rows, inside, D, BD)
        g_tile = tile_of(g_head, g_s, rows, inside, D, BD)
        lse_row = tl.load(lse + base + rows, mask=inside, other=0.0)
        own = tl.load(delta + base + rows, mask=inside, other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        p = tl.where(inside[:, None] & real[None, :], power_of_two((s - lse_row[:, None]) * LOG2_E), 0.0)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        kept = p
        if DROPOUT:
            ones = _dropped(tl.full((BM, BN), 1.0, tl.float32), word, task, rows, first, length, limit, drop_scale, BN)
            kept = p * ones
            dp = dp * ones
        acc_v = tl.dot(tl.trans(kept.to(g_tile.dtype)), g_tile, acc_v, input_precision=PRECISION)
        ds = p * (dp - own[:, None])
        if LOSS:
            real_q = real_tokens(mask_row, rows, length)
            qt_tile = tile_of(qt_head, qt_s, rows, real_q, D_T, BD_T)
            t = tl.dot(qt_tile, tl.trans(kt_tile), input_precision=PRECISION) * scale_t
            difference = tl.where(real_q[:, None] & real[None, :], s - t, 0.0)
            if LOSS_APART:
                apart = tl.dot(tl.trans(difference.to(q_tile.dtype)), q_tile, apart, input_precision=PRECISION)
            else:
                ds += difference * factor
        acc_k = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, acc_k, input_precision=PRECISION)
    if LOSS_APART:
        acc_k += apart * factor
    inside = keys < length
    store_tile(head_of(grad_k, task, heads, dk_b, dk_h), dk_s, keys, inside, acc_k * scale, D, BD)
    store_tile(head_of(grad_v, task, heads, dv_b, dv_h), dv_s, keys, inside, acc_v, D, BD)
