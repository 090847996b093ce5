"""The Triton kernels of the KD losses (`kernels.triton.losses`); sums are float32 in a program, float64 over programs.

A program leaves its share of the loss in a float32 of its own; one more launch adds all of them, of all layers.

Rejected: atomic additions, whose order, and so the last bits, change from run to run.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.attention_kernels import LOG2_E, head_of, real_tokens, store_tile, tile_of
from kernels.triton.gemm import _multiply
from kernels.triton.primitives import power_of_two

UNIT = tl.constexpr(2.0**-53 * 1.01)
"""Unit roundoff of float64, with a hundredth for higher orders (n 2^-53 is far below it)."""


@triton.jit
def mask_shares_kernel(mask, out, batch, length, heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out: float32 [2] = 1 / (heads * sum over samples of n²), 1 / (sum of n) for n real tokens. One program."""
    pairs = tl.zeros((ROWS,), tl.int64)
    tokens = tl.zeros((ROWS,), tl.int64)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        count = tl.zeros((ROWS,), tl.int32)
        for start in range(0, length, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            at = mask + rows[:, None].to(tl.int64) * length + columns[None, :]
            inside = (rows[:, None] < batch) & (columns[None, :] < length)
            count += tl.sum((tl.load(at, mask=inside, other=0) != 0).to(tl.int32), 1)
        tokens += count
        pairs += count.to(tl.int64) * count
    all_pairs = tl.maximum(tl.sum(pairs, 0) * heads, 1)
    all_tokens = tl.maximum(tl.sum(tokens, 0), 1)
    tl.store(out, (1.0 / all_pairs.to(tl.float64)).to(tl.float32))
    tl.store(out + 1, (1.0 / all_tokens.to(tl.float64)).to(tl.float32))


@triton.jit
def total_kernel(parts, share, out, count, factor, BLOCK: tl.constexpr):
    """out = factor * share * sum of parts; float64 inside, a fixed order. One program."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(parts + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(out, (tl.sum(total, 0) * tl.load(share).to(tl.float64) * factor).to(tl.float32))


@triton.jit
def scaled_sum_kernel(parts, share, out, size, count, factor, BLOCK: tl.constexpr):
    """out[i] = factor * share * sum over p < count of parts[p, i]; float32 parts [count, size], added in order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    row = parts + at
    for _ in range(count):
        total += tl.load(row, mask=at < size, other=0.0)
        row += size
    tl.store(out + at, (total * (tl.load(share) * factor)).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _pick(tensors, layer, LAYERS: tl.constexpr):
    """The pointer of a layer."""
    found = tensors[0]
    for k in tl.static_range(1, LAYERS):
        if layer == k:
            found = tensors[k]
    return found


@triton.jit
def score_mse_kernel(
    own, other, own_t, other_t, grad, mask, share, done, parts,
    own_b, own_h, own_s, other_b, other_h, other_s, ownt_b, ownt_h, ownt_s, othert_b, othert_h, othert_s,
    grad_b, grad_h, grad_s, heads, length, scale_s, scale_t,
    LAYERS: tl.constexpr, D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BD_T: tl.constexpr,
    GRADIENT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles of scale_s own·other - scale_t own_t·other_t, squared and summed, and multiplied by `other`: the gradient.

    Queries as `own` give the loss and dq, keys as `own` dk. Grid (blocks of rows, heads of samples, layers).

    Args:
        own, other, own_t, other_t, grad: one pointer per layer.
        done: int32 [layers, heads of samples], heads the Gram form served already, or None.
        parts: float32 [layers, heads of samples, blocks], or None: only the gradient.
    """
    task = tl.program_id(1)
    layer = tl.program_id(2)
    index = layer * tl.num_programs(1) + task
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    mask_row = mask + (task // heads).to(tl.int64) * length
    real_rows = real_tokens(mask_row, rows, length)
    own_tile = tile_of(head_of(_pick(own, layer, LAYERS), task, heads, own_b, own_h), own_s, rows, real_rows, D, BD)
    ownt = head_of(_pick(own_t, layer, LAYERS), task, heads, ownt_b, ownt_h)
    ownt_tile = tile_of(ownt, ownt_s, rows, real_rows, D_T, BD_T)
    other_head = head_of(_pick(other, layer, LAYERS), task, heads, other_b, other_h)
    othert_head = head_of(_pick(other_t, layer, LAYERS), task, heads, othert_b, othert_h)
    end = length
    if done is not None:
        end = tl.where(tl.load(done + index) != 0, 0, length)
    # A tile of scores [BM, BN] lives in registers for the sum and for the gradient's product, then is gone. Rows and
    # keys that are padding were loaded as zeros: their scores are 0 on both sides.
    squares = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    for first in range(0, end, BN):
        others = first + tl.arange(0, BN)
        real = real_tokens(mask_row, others, length)
        other_tile = tile_of(other_head, other_s, others, real, D, BD)
        othert_tile = tile_of(othert_head, othert_s, others, real, D_T, BD_T)
        s = tl.dot(own_tile, tl.trans(other_tile), input_precision=PRECISION) * scale_s
        difference = s - tl.dot(ownt_tile, tl.trans(othert_tile), input_precision=PRECISION) * scale_t
        squares += tl.sum(difference * difference, 1)
        if GRADIENT:
            acc = tl.dot(difference.to(other_tile.dtype), other_tile, acc, input_precision=PRECISION)
    if parts is not None:
        tl.store(parts + index * tl.num_programs(0) + tl.program_id(0), tl.sum(squares, 0))
    if GRADIENT:
        acc = acc * (2.0 * scale_s * tl.load(share))
        target = head_of(_pick(grad, layer, LAYERS), task, heads, grad_b, grad_h)
        store_tile(target, grad_s, rows, rows < end, acc, D, BD)


@triton.jit
def _gram(a, a_s, b, b_s, mask_row, length, DA: tl.constexpr, DB: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    """aᵀ b over real tokens, float64 [BD, BD]."""
    total = tl.zeros((BD, BD), tl.float64)
    for first in range(0, length, BK):
        rows = first + tl.arange(0, BK)
        real = real_tokens(mask_row, rows, length)
        left = tile_of(a, a_s, rows, real, DA, BD).to(tl.float64)
        right = tile_of(b, b_s, rows, real, DB, BD).to(tl.float64)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee", out_dtype=tl.float64)
    return total


@triton.jit
def _norm(gram, BD: tl.constexpr):
    """Frobenius norm of the matrix that `gram` is the Gram matrix of."""
    diagonal = tl.arange(0, BD)[:, None] == tl.arange(0, BD)[None, :]
    return tl.sqrt(tl.sum(tl.sum(tl.where(diagonal, gram, 0.0), 1), 0))


@triton.jit
def score_gram_kernel(
    q, k, q_t, k_t, mask, done, parts, grams,
    q_b, q_h, q_s, k_b, k_h, k_s, qt_b, qt_h, qt_s, kt_b, kt_h, kt_s, heads, length, scale_s, scale_t, limit,
    LAYERS: tl.constexpr, D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The Gram form (`kernels.reference.losses`) of one head: sum (s - t)² = scale_s² <QsᵀQs, KsᵀKs>
    - 2 scale_s scale_t <QsᵀQt, KsᵀKt> + scale_t² <QtᵀQt, KtᵀKt>, in float64. Grid (heads of samples, layers).

    `done` gets 1 and `parts` [layers, heads of samples] the sum where the error, bounded as in `gram_error_bound`, is
    proven to be at most `limit` of it; else both get 0, and the tiled kernel serves the head. limit < 0 takes the
    result as it is.

    grams: float32 [layers, heads of samples, 4, BD, BD], QsᵀQs, QsᵀQt, KsᵀKs, KsᵀKt for the gradients; or None.
    """
    task = tl.program_id(0)
    layer = tl.program_id(1)
    index = layer * tl.num_programs(0) + task
    mask_row = mask + (task // heads).to(tl.int64) * length
    q_head = head_of(_pick(q, layer, LAYERS), task, heads, q_b, q_h)
    k_head = head_of(_pick(k, layer, LAYERS), task, heads, k_b, k_h)
    qt_head = head_of(_pick(q_t, layer, LAYERS), task, heads, qt_b, qt_h)
    kt_head = head_of(_pick(k_t, layer, LAYERS), task, heads, kt_b, kt_h)
    # Three pairs of Gram matrices, one pair at a time: two float64 tiles [BD, BD] are what registers hold.
    entries = tl.arange(0, BD)[:, None] * BD + tl.arange(0, BD)[None, :]
    a = _gram(qt_head, qt_s, qt_head, qt_s, mask_row, length, D_T, D_T, BD, BK)
    b = _gram(kt_head, kt_s, kt_head, kt_s, mask_row, length, D_T, D_T, BD, BK)
    total = tl.sum(tl.sum(a * b, 1), 0) * scale_t * scale_t
    size = _norm(a, BD) * _norm(b, BD) * tl.abs(scale_t)
    a = _gram(q_head, q_s, qt_head, qt_s, mask_row, length, D, D_T, BD, BK)
    b = _gram(k_head, k_s, kt_head, kt_s, mask_row, length, D, D_T, BD, BK)
    total -= 2.0 * tl.sum(tl.sum(a * b, 1), 0) * scale_s * scale_t
    if grams is not None:
        own = grams + index.to(tl.int64) * (4 * BD * BD) + entries
        tl.store(own + BD * BD, a.to(tl.float32))
        tl.store(own + 3 * BD * BD, b.to(tl.float32))
    a = _gram(q_head, q_s, q_head, q_s, mask_row, length, D, D, BD, BK)
    b = _gram(k_head, k_s, k_head, k_s, mask_row, length, D, D, BD, BK)
    total += tl.sum(tl.sum(a * b, 1), 0) * scale_s * scale_s
    if grams is not None:
        own = grams + index.to(tl.int64) * (4 * BD * BD) + entries
        tl.store(own, a.to(tl.float32))
        tl.store(own + 2 * BD * BD, b.to(tl.float32))
    size += _norm(a, BD) * _norm(b, BD) * tl.abs(scale_s)
    total = tl.maximum(total, 0.0)
    width = D + D_T
    bound = (2 * length + width * width + 16) * UNIT * size * size
    good = (bound * (1.0 + limit) <= limit * total) | (limit < 0.0)
    tl.store(done + index, good.to(tl.int32))
    tl.store(parts + index, tl.where(good, total, 0.0).to(tl.float32))


@triton.jit
def score_gram_grad_kernel(
    own, own_t, grad, grams, mask, share, done,
    own_b, own_h, own_s, ownt_b, ownt_h, ownt_s, grad_b, grad_h, grad_s, heads, length, scale_s, scale_t, first_gram,
    LAYERS: tl.constexpr, D: tl.constexpr, D_T: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """2 scale_s share (scale_s own G_ss - scale_t own_t G_stᵀ) of heads that are `done`.

    Grid (blocks of rows, heads of samples, layers). The Grams are those of the other side: 2 as `first_gram` for
    queries, 0 for keys.
    """
    task = tl.program_id(1)
    layer = tl.program_id(2)
    index = layer * tl.num_programs(1) + task
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    end = tl.where(tl.load(done + index) != 0, length, 0)
    mask_row = mask + (task // heads).to(tl.int64) * length
    real = real_tokens(mask_row, rows, end)
    first = grams + (index.to(tl.int64) * 4 + first_gram) * (BD * BD)
    own_rows = head_of(_pick(own, layer, LAYERS), task, heads, own_b, own_h) + rows[:, None].to(tl.int64) * own_s
    ownt_rows = head_of(_pick(own_t, layer, LAYERS), task, heads, ownt_b, ownt_h) + rows[:, None].to(tl.int64) * ownt_s
    columns = tl.arange(0, BD)[None, :]
    value = tl.zeros((BM, BD), tl.float32)
    for start in range(0, BD, 16):  # whole rows at once spill in float32
        k = start + tl.arange(0, 16)
        x = tl.load(own_rows + k[None, :], mask=real[:, None] & (k[None, :] < D), other=0.0).to(tl.float32)
        y = tl.load(ownt_rows + k[None, :], mask=real[:, None] & (k[None, :] < D_T), other=0.0).to(tl.float32)
        value = tl.dot(x * scale_s, tl.load(first + k[:, None] * BD + columns), value, input_precision="ieee")
        cross = tl.load(first + BD * BD + columns * BD + k[:, None])
        value = tl.dot(y * -scale_t, cross, value, input_precision="ieee")
    target = head_of(_pick(grad, layer, LAYERS), task, heads, grad_b, grad_h)
    store_tile(target, grad_s, rows, rows < end, value * (2.0 * scale_s * tl.load(share)), D, BD)


@triton.jit
def hidden_difference_kernel(
    states, weight, bias, teacher, mask, difference, sums, parts,
    units_a, width_a, units_w, depth_units, stride_t, stride_d, tokens, columns,
    ALIGN_A: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_DEPTH: tl.constexpr, PEEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d = states @ weight.T + bias - teacher at real tokens, 0 elsewhere. Grid (column blocks, token blocks).

    Args:
        states: [tokens, K]; weight: [columns, K]; units and alignments as in `kernels.triton.gemm.ffn_linear_kernel`.
        bias: [columns] or None; teacher: [tokens, columns]; mask: [tokens].
        difference: [tokens, columns], rows padded, surplus columns get zeros; None: not stored.
        sums: float32 [token blocks, columns], column sums of d, or None.
        parts: float32 [token blocks, column blocks], sums of d².
    """
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * BM
    depth = depth_units * ALIGN_DEPTH
    acc = _multiply(
        states, units_a * ALIGN_A, width_a * ALIGN_A, weight, units_w * ALIGN_W, depth, depth, m0, tokens, n0, columns,
        True, PEEL, BM, BN, BK, PRECISION,
    )  # fmt: skip
    # The projection's block is in registers, [BM, BN] float32: compared with the teacher before anything is rounded.
    rows = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    real = real_tokens(mask, rows, tokens)
    inside = real[:, None] & (n[None, :] < columns)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
    wanted = tl.load(teacher + rows[:, None].to(tl.int64) * stride_t + n[None, :], mask=inside, other=0.0)
    d = tl.where(inside, acc - wanted.to(tl.float32), 0.0)
    tl.store(parts + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.sum(d * d, 1), 0))
    if sums is not None:
        tl.store(sums + tl.program_id(1).to(tl.int64) * columns + n, tl.sum(d, 0), mask=n < columns)
    if difference is not None:
        at = difference + rows[:, None].to(tl.int64) * stride_d + n[None, :]
        stored = (rows[:, None] < tokens) & (n[None, :] < stride_d)
        tl.store(at, d.to(difference.dtype.element_ty), mask=stored)


@triton.jit
def hidden_state_grad_kernel(
    difference, weight, share, grad, units_g, width_g, units_w, width_w, stride_out, tokens, depth, columns, factor,
    ALIGN_G: tl.constexpr, ALIGN_W: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad = factor * share * difference @ weight; difference [tokens, depth], weight [depth, columns]."""
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * BM
    acc = _multiply(
        difference, units_g * ALIGN_G, width_g * ALIGN_G, weight, units_w * ALIGN_W, width_w * ALIGN_W, depth, m0,
        tokens, n0, columns, False, False, BM, BN, BK, PRECISION,
    )  # fmt: skip
    rows = m0 + tl.arange(0, BM)
    n = n0 + tl.arange(0, BN)
    value = acc * (factor * tl.load(share))
    at = grad + rows[:, None].to(tl.int64) * stride_out + n[None, :]
    tl.store(at, value.to(grad.dtype.element_ty), mask=(rows[:, None] < tokens) & (n[None, :] < columns))


@triton.jit
def soft_cross_entropy_kernel(
    student, teacher, grad, parts, rows, classes, inverse, factor, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """-sum of p_t log p_s by row, and factor (p_s - p_t); logits contiguous [rows, classes], inverse = 1 / T.

    parts: float32, one per program; grad: as student, or None.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    base = row.to(tl.int64)[:, None] * classes
    # Three passes over the classes, which stay in cache: maxima, sums, gradient. Both softmaxes at once.
    high_s = tl.full((ROWS,), float("-inf"), tl.float32)
    high_t = tl.full((ROWS,), float("-inf"), tl.float32)
    for first in range(0, classes, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        wanted = inside[:, None] & (c < classes)
        high_s = tl.maximum(
            high_s, tl.max(tl.load(student + base + c, mask=wanted, other=float("-inf")).to(tl.float32), 1)
        )
        high_t = tl.maximum(
            high_t, tl.max(tl.load(teacher + base + c, mask=wanted, other=float("-inf")).to(tl.float32), 1)
        )
    high_s = tl.where(inside, high_s, 0.0)
    high_t = tl.where(inside, high_t, 0.0)
    total_s = tl.zeros((ROWS,), tl.float32)
    total_t = tl.zeros((ROWS,), tl.float32)
    product = tl.zeros((ROWS,), tl.float32)
    for first in range(0, classes, BLOCK):
        c = first + tl.arange(0, BLOCK)[None, :]
        wanted = inside[:, None] & (c < classes)
        s = (tl.load(student + base + c, mask=wanted, other=0.0).to(tl.float32) - high_s[:, None]) * inverse
        t = (tl.load(teacher + base + c, mask=wanted, other=0.0).to(tl.float32) - high_t[:, None]) * inverse
        e = tl.where(wanted, power_of_two(t * LOG2_E), 0.0)
        total_s += tl.sum(tl.where(wanted, power_of_two(s * LOG2_E), 0.0), 1)
        total_t += tl.sum(e, 1)
        product += tl.sum(tl.where(e == 0.0, 0.0, e * s), 1)
    total_s = tl.where(inside, total_s, 1.0)
    total_t = tl.where(inside, total_t, 1.0)
    loss = tl.log(total_s) - product / total_t
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), 0))
    if grad is not None:
        for first in range(0, classes, BLOCK):
            c = first + tl.arange(0, BLOCK)[None, :]
            wanted = inside[:, None] & (c < classes)
            s = (tl.load(student + base + c, mask=wanted, other=0.0).to(tl.float32) - high_s[:, None]) * inverse
            t = (tl.load(teacher + base + c, mask=wanted, other=0.0).to(tl.float32) - high_t[:, None]) * inverse
            p = power_of_two(s * LOG2_E) / total_s[:, None] - power_of_two(t * LOG2_E) / total_t[:, None]
            tl.store(grad + base + c, (p * factor).to(grad.dtype.element_ty), mask=wanted)
