"""The Triton kernels of `kernels.triton.rows`: whole rows of post, dropout, residual and LayerNorm; and `pre`.

All are float32 inside, with tiles of [ROWS, FIRST] and [ROWS, SECOND] columns (SECOND may be 0).
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

POST = tl.constexpr(2)
POST_BWD = tl.constexpr(5)


@triton.jit
def _kept(seed, first_row, limit, layer, START: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: what dropout keeps (`kernels.reference.philox`); START and COLUMNS are multiples of 4."""
    group = (START // 4 + tl.arange(0, COLUMNS // 4))[None, :] + tl.zeros((ROWS, 1), tl.int32)
    row = (first_row + tl.arange(0, ROWS))[:, None] + tl.zeros((1, COLUMNS // 4), tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, group, row, tl.zeros_like(row), tl.zeros_like(row) + layer)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words > (limit.to(tl.int64) + 2147483648).to(tl.uint32)


@triton.jit
def _tile(t, stride, first_row, columns, tokens, hidden, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    inside = (first_row + rows < tokens) & (columns[None, :] < hidden)
    at = first_row.to(tl.int64) * stride + (rows * stride + columns[None, :])
    return tl.load(t + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(t, stride, first_row, columns, tokens, hidden, value, ROWS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    inside = (first_row + rows < tokens) & (columns[None, :] < hidden)
    at = first_row.to(tl.int64) * stride + (rows * stride + columns[None, :])
    tl.store(t + at, value.to(t.dtype.element_ty), mask=inside)


@triton.jit
def _total(
    x, y, y2, seed, code, stride_x, stride_y, first_row, tokens, hidden, limit, scale, layer,
    LN: tl.constexpr, DROPOUT: tl.constexpr, EVALUATE: tl.constexpr, SLOTS: tl.constexpr,
    START: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x + dropout(post(x, y, y2)), or post alone without LayerNorm, of one block of columns; 0 outside."""
    # Columns past `hidden` and rows past `tokens` are loaded as 0, run through post like the others, and cut off below.
    columns = START + tl.arange(0, COLUMNS)
    x_tile = _tile(x, stride_x, first_row, columns, tokens, hidden, ROWS)
    y_tile = _tile(y, stride_y, first_row, columns, tokens, hidden, ROWS)
    b_tile = y_tile
    if y2 is not None:
        b_tile = _tile(y2, stride_y, first_row, columns, tokens, hidden, ROWS)
    value, _, _, _ = EVALUATE(code, x_tile, y_tile, b_tile, y_tile, columns[None, :], hidden, POST, SLOTS, False, 1)
    if LN:
        if DROPOUT:
            kept = _kept(tl.load(seed), first_row, limit, layer, START, ROWS, COLUMNS)
            value = tl.where(kept, value * scale, 0.0)
        value += x_tile
    return tl.where(columns[None, :] < hidden, value, 0.0)


@triton.jit
def _centered_square(total, mean, hidden, START: tl.constexpr, COLUMNS: tl.constexpr):
    columns = START + tl.arange(0, COLUMNS)
    centered = tl.where(columns[None, :] < hidden, total - mean[:, None], 0.0)
    return tl.sum(centered * centered, axis=1)


@triton.jit
def _normalize_and_store(
    out, total, mean, rstd, gamma, beta, first_row, tokens, hidden,
    START: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = START + tl.arange(0, COLUMNS)
    if gamma is not None:
        weight = tl.load(gamma + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        bias = tl.load(beta + columns, mask=columns < hidden, other=0.0).to(tl.float32)
        total = tl.fma((total - mean[:, None]) * rstd[:, None], weight[None, :], bias[None, :])
    _store(out, hidden, first_row, columns, tokens, hidden, total, ROWS)


@triton.jit(do_not_specialize=["units_x", "units_y", "tokens", "hidden_units", "limit", "layer"])
def ffn_rows_kernel(
    x, y, y2, out, stats, gamma, beta, seed, code,
    units_x, units_y, tokens, hidden_units, limit, scale, eps, layer,
    EVALUATE: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """out = LayerNorm(x + dropout(post(x, y, y2))), or post alone where gamma is None.

    Args:
        x, y, y2, out: [tokens, hidden]; row strides of x and y (y2 as y) in units of ALIGN, out is contiguous.
        stats: float32 [tokens, 2] or None: takes mean and 1 / deviation.
        seed: int64 [1]; limit: an unsigned word less 2^31: larger words are kept; scale: of what is kept.
    """
    hidden = hidden_units * ALIGN
    stride_x = units_x * ALIGN
    stride_y = units_y * ALIGN
    first_row = tl.program_id(0) * ROWS
    LN: tl.constexpr = gamma is not None
    # Whole rows in registers, as one block of columns or two: 540 = 512 + 32 wastes 4 columns, a power of two 484. Mean
    # and variance in two passes over them, which cost no memory traffic.
    t1 = _total(
        x, y, y2, seed, code, stride_x, stride_y, first_row, tokens, hidden, limit, scale, layer,
        LN, DROPOUT, EVALUATE, SLOTS, 0, ROWS, FIRST,
    )  # fmt: skip
    mean = tl.sum(t1, axis=1)
    if SECOND > 0:
        t2 = _total(
            x, y, y2, seed, code, stride_x, stride_y, first_row, tokens, hidden, limit, scale, layer,
            LN, DROPOUT, EVALUATE, SLOTS, FIRST, ROWS, SECOND,
        )  # fmt: skip
        mean += tl.sum(t2, axis=1)
    mean = mean / hidden
    rstd = mean
    if LN:
        square = _centered_square(t1, mean, hidden, 0, FIRST)
        if SECOND > 0:
            square += _centered_square(t2, mean, hidden, FIRST, SECOND)
        rstd = 1.0 / tl.sqrt(square / hidden + eps)
        if stats is not None:
            rows = first_row + tl.arange(0, ROWS)
            tl.store(stats + rows * 2, mean, mask=rows < tokens)
            tl.store(stats + rows * 2 + 1, rstd, mask=rows < tokens)
    _normalize_and_store(out, t1, mean, rstd, gamma, beta, first_row, tokens, hidden, 0, ROWS, FIRST)
    if SECOND > 0:
        _normalize_and_store(out, t2, mean, rstd, gamma, beta, first_row, tokens, hidden, FIRST, ROWS, SECOND)


@triton.jit
def _normalized(total, mean, rstd, g, gamma, hidden, START: tl.constexpr, COLUMNS: tl.constexpr):
    """(normalized rows, gradient of them), 0 outside."""
    columns = START + tl.arange(0, COLUMNS)
    weight = tl.load(gamma + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    normalized = tl.where(columns[None, :] < hidden, (total - mean[:, None]) * rstd[:, None], 0.0)
    return normalized, g * weight[None, :]


@triton.jit
def _post_bwd_block(
    grad, x, y, y2, dy, dy2, dx, seed, code, stride_x, stride_y, stride_dy,
    first_row, tokens, hidden, limit, scale, layer,
    LN: tl.constexpr, DROPOUT: tl.constexpr, EVALUATE: tl.constexpr, SLOTS: tl.constexpr, USES_X: tl.constexpr,
    PARALLEL: tl.constexpr, START: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Runs post_bwd on one block of columns, given the gradient of LayerNorm's input (or of post); (dy, dy2)."""
    columns = START + tl.arange(0, COLUMNS)
    x_tile = _tile(x, stride_x, first_row, columns, tokens, hidden, ROWS)
    y_tile = x_tile
    if y is not None:
        y_tile = _tile(y, stride_y, first_row, columns, tokens, hidden, ROWS)
    b_tile = y_tile
    if y2 is not None:
        b_tile = _tile(y2, stride_y, first_row, columns, tokens, hidden, ROWS)
    g = grad
    if LN and DROPOUT:
        kept = _kept(tl.load(seed), first_row, limit, layer, START, ROWS, COLUMNS)
        g = tl.where(kept, g * scale, 0.0)
    OUTPUTS: tl.constexpr = 4 + (2 if USES_X else 0) + (8 if PARALLEL else 0)
    _, own, da, db = EVALUATE(code, x_tile, y_tile, b_tile, g, columns[None, :], hidden, POST_BWD, SLOTS, True, OUTPUTS)
    _store(dy, stride_dy, first_row, columns, tokens, hidden, da, ROWS)
    if PARALLEL:
        _store(dy2, stride_dy, first_row, columns, tokens, hidden, db, ROWS)
    if dx is not None:
        total = own
        if LN:
            total = grad
            if USES_X:
                total = grad + own
        _store(dx, hidden, first_row, columns, tokens, hidden, total, ROWS)
    inside = (first_row + tl.arange(0, ROWS)[:, None] < tokens) & (columns[None, :] < hidden)
    return tl.where(inside, da, 0.0), tl.where(inside, db, 0.0)


@triton.jit
def _store_sums(
    sums, hidden, programs, dgamma, dbeta, da, db, LN: tl.constexpr, PARALLEL: tl.constexpr,
    START: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes a program's column sums to row program_id of sums [4, programs, hidden]."""
    columns = START + tl.arange(0, COLUMNS)
    at = sums + tl.program_id(0) * hidden + columns
    plane = programs * hidden
    if LN:
        tl.store(at, dgamma, mask=columns < hidden)
        tl.store(at + plane, dbeta, mask=columns < hidden)
    tl.store(at + 2 * plane, da, mask=columns < hidden)
    if PARALLEL:
        tl.store(at + 3 * plane, db, mask=columns < hidden)


@triton.jit(
    do_not_specialize=[
        "units_g",
        "units_x",
        "units_y",
        "units_dy",
        "tokens",
        "hidden_units",
        "limit",
        "layer",
        "programs",
    ]
)
def ffn_rows_bwd_kernel(
    grad_out, x, y, y2, stats, gamma, seed, code, dy, dy2, dx, sums,
    units_g, units_x, units_y, units_dy, tokens, hidden_units, limit, scale, layer, programs,
    EVALUATE: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr, DROPOUT: tl.constexpr, USES_X: tl.constexpr,
    PARALLEL: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Backward of `ffn_rows_kernel`: dy, dy2, the share of dx, and partial column sums of each program.

    Args:
        dx: float32 [tokens, hidden] contiguous, or None; dy, dy2: row stride units_dy * ALIGN.
        sums: float32 [4, programs, hidden] or None: of dgamma, dbeta, dy, dy2.
    """
    hidden = hidden_units * ALIGN
    stride_g = units_g * ALIGN
    stride_x = units_x * ALIGN
    stride_y = units_y * ALIGN
    stride_dy = units_dy * ALIGN
    LN: tl.constexpr = gamma is not None
    dgamma1 = tl.zeros((FIRST,), tl.float32)
    dbeta1 = dgamma1
    da1 = dgamma1
    db1 = dgamma1
    if SECOND > 0:
        dgamma2 = tl.zeros((SECOND,), tl.float32)
        dbeta2 = dgamma2
        da2 = dgamma2
        db2 = dgamma2
    # A program takes every `programs`-th group of rows, so that its column sums stay in registers over all of them.
    for group in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), programs, num_stages=1):
        first_row = group * ROWS
        g1 = _tile(grad_out, stride_g, first_row, tl.arange(0, FIRST), tokens, hidden, ROWS)
        if SECOND > 0:
            g2 = _tile(grad_out, stride_g, first_row, FIRST + tl.arange(0, SECOND), tokens, hidden, ROWS)
        if LN:
            rows = first_row + tl.arange(0, ROWS)
            mean = tl.load(stats + rows * 2, mask=rows < tokens, other=0.0)
            rstd = tl.load(stats + rows * 2 + 1, mask=rows < tokens, other=0.0)
            t1 = _total(
                x, y, y2, seed, code, stride_x, stride_y, first_row, tokens, hidden, limit, scale, layer,
                LN, DROPOUT, EVALUATE, SLOTS, 0, ROWS, FIRST,
            )  # fmt: skip
            # LayerNorm's input was not saved: post again gives it. With h = normalized and a = g * gamma, its gradient
            # is rstd * (a - mean(a) - h * mean(a * h)); t is h and n is a from here on.
            t1, n1 = _normalized(t1, mean, rstd, g1, gamma, hidden, 0, FIRST)
            dgamma1 += tl.sum(tl.where((rows < tokens)[:, None], g1 * t1, 0.0), axis=0)
            dbeta1 += tl.sum(g1, axis=0)
            c1 = tl.sum(n1, axis=1)
            c2 = tl.sum(n1 * t1, axis=1)
            if SECOND > 0:
                t2 = _total(
                    x, y, y2, seed, code, stride_x, stride_y, first_row, tokens, hidden, limit, scale, layer,
                    LN, DROPOUT, EVALUATE, SLOTS, FIRST, ROWS, SECOND,
                )  # fmt: skip
                t2, n2 = _normalized(t2, mean, rstd, g2, gamma, hidden, FIRST, SECOND)
                dgamma2 += tl.sum(tl.where((rows < tokens)[:, None], g2 * t2, 0.0), axis=0)
                dbeta2 += tl.sum(g2, axis=0)
                c1 += tl.sum(n2, axis=1)
                c2 += tl.sum(n2 * t2, axis=1)
            c1 = (c1 / hidden)[:, None]
            c2 = (c2 / hidden)[:, None]
            g1 = rstd[:, None] * (n1 - tl.fma(t1, c2 + tl.zeros_like(t1), c1 + tl.zeros_like(t1)))
            if SECOND > 0:
                g2 = rstd[:, None] * (n2 - tl.fma(t2, c2 + tl.zeros_like(t2), c1 + tl.zeros_like(t2)))
        a, b = _post_bwd_block(
            g1, x, y, y2, dy, dy2, dx, seed, code, stride_x, stride_y, stride_dy, first_row, tokens, hidden, limit,
            scale, layer, LN, DROPOUT, EVALUATE, SLOTS, USES_X, PARALLEL, 0, ROWS, FIRST,
        )  # fmt: skip
        da1 += tl.sum(a, axis=0)
        db1 += tl.sum(b, axis=0)
        if SECOND > 0:
            a, b = _post_bwd_block(
                g2, x, y, y2, dy, dy2, dx, seed, code, stride_x, stride_y, stride_dy, first_row, tokens, hidden, limit,
                scale, layer, LN, DROPOUT, EVALUATE, SLOTS, USES_X, PARALLEL, FIRST, ROWS, SECOND,
            )  # fmt: skip
            da2 += tl.sum(a, axis=0)
            db2 += tl.sum(b, axis=0)
    if sums is not None:
        _store_sums(sums, hidden, programs, dgamma1, dbeta1, da1, db1, LN, PARALLEL, 0, FIRST)
        if SECOND > 0:
            _store_sums(sums, hidden, programs, dgamma2, dbeta2, da2, db2, LN, PARALLEL, FIRST, SECOND)


@triton.jit(do_not_specialize=["units_x", "units_out", "tokens", "hidden"])
def ffn_pre_kernel(
    x, out, code, units_x, units_out, tokens, hidden,
    EVALUATE: tl.constexpr, SEGMENT: tl.constexpr, SLOTS: tl.constexpr, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out = a segment of x alone; out is [tokens, hidden] with its row stride's surplus columns set to 0."""
    stride_out = units_out * ALIGN
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    first_row = tl.program_id(0) * BM
    x_tile = _tile(x, units_x * ALIGN, first_row, columns, tokens, hidden, BM)
    value, _, _, _ = EVALUATE(code, x_tile, x_tile, x_tile, x_tile, columns[None, :], hidden, SEGMENT, SLOTS, False, 1)
    value = tl.where(columns[None, :] < hidden, value, 0.0)
    _store(out, stride_out, first_row, columns, tokens, stride_out, value, BM)
