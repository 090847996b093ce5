"""Epilogues of the products: what happens to an accumulator [BM, BN] at row m0 and column n0 before it is stored.

Both run a segment of the program on groups of columns, SPLIT (1, 2 or 4) of them one after the other: the tiles of the
interpreting machine then have 16 elements a thread or fewer, and stay in registers. The arguments are those of the
kernels in `kernels.triton.gemm`, with row strides in elements.

Rejected: a loop over the groups. Triton can cut a tile only into halves known at compile time.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _halves(t):
    """Left and right half of the columns of a tile; both stay in the registers they are in."""
    rows: tl.constexpr = t.shape[0]
    half: tl.constexpr = t.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(t, (rows, 2, half)), (0, 2, 1)))


@triton.jit
def _load_tile(t, stride, m0, rows, columns, mask):
    """float32 tile of t at row m0 + rows."""
    return tl.load(t + m0.to(tl.int64) * stride + (rows * stride + columns), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(t, stride, m0, rows, columns, value, mask):
    tl.store(t + m0.to(tl.int64) * stride + (rows * stride + columns), value.to(t.dtype.element_ty), mask=mask)


@triton.jit
def _linear_columns(
    h, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = h.shape[0]
    BN: tl.constexpr = h.shape[1]
    rows = tl.arange(0, BM)[:, None]
    n = (n0 + tl.arange(0, BN))[None, :]
    # h [BM, BN] float32 is still in registers: bias, what backward wants of h, and mid, before anything is rounded.
    h += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    written = (m0 + rows < tokens) & (n < stride_out)  # surplus columns too: they must hold zeros
    if saved_h is not None:
        _store_tile(saved_h, stride_out, m0, rows, n, tl.where(n < columns, h, 0.0), written)
    value = h
    if EVALUATE is not None:
        x_tile = h
        if READS_X:
            x_tile = _load_tile(x, stride_x, m0, rows, n, (m0 + rows < tokens) & (n < hidden))
        value, _, _, _ = EVALUATE(code, x_tile, h, h, h, n, hidden, SEGMENT, SLOTS, False, 1)
    _store_tile(out, stride_out, m0, rows, n, tl.where(n < columns, value, 0.0), written)


@triton.jit
def _linear_halves(
    acc, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    if SPLIT == 1:
        _linear_columns(
            acc, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
            SEGMENT, SLOTS, EVALUATE, READS_X,
        )  # fmt: skip
    else:
        left, right = _halves(acc)
        _linear_columns(
            left, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
            SEGMENT, SLOTS, EVALUATE, READS_X,
        )  # fmt: skip
        _linear_columns(
            right, n0 + acc.shape[1] // 2, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns,
            hidden, SEGMENT, SLOTS, EVALUATE, READS_X,
        )  # fmt: skip


@triton.jit
def linear_epilogue(
    acc, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Bias, the segment, and the stores of `ffn_linear_kernel`."""
    if SPLIT == 4:
        left, right = _halves(acc)
        _linear_halves(
            left, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
            SEGMENT, SLOTS, EVALUATE, READS_X, 2,
        )  # fmt: skip
        _linear_halves(
            right, n0 + acc.shape[1] // 2, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns,
            hidden, SEGMENT, SLOTS, EVALUATE, READS_X, 2,
        )  # fmt: skip
    else:
        _linear_halves(
            acc, n0, m0, out, stride_out, saved_h, bias, x, stride_x, code, tokens, columns, hidden,
            SEGMENT, SLOTS, EVALUATE, READS_X, SPLIT,
        )  # fmt: skip


@triton.jit
def _linear_bwd_columns(
    g, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
    tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr, READS_H: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = g.shape[0]
    BN: tl.constexpr = g.shape[1]
    rows = tl.arange(0, BM)[:, None]
    n = (n0 + tl.arange(0, BN))[None, :]
    inside = m0 + rows < tokens
    x_tile = g
    if READS_X:
        x_tile = _load_tile(x, stride_x, m0, rows, n, inside & (n < hidden))
    h_tile = g
    if READS_H:
        h_tile = _load_tile(h, stride_out, m0, rows, n, inside & (n < stride_out))
    VALUE: tl.constexpr = 0 if value is None else 1
    DX: tl.constexpr = 0 if dx_out is None else 2
    DA: tl.constexpr = 0 if da is None else 4
    out, dx, dh, _ = EVALUATE(code, x_tile, h_tile, g, g, n, hidden, SEGMENT, SLOTS, True, VALUE + DX + DA)
    if dx_out is not None:
        shared = inside & (n < columns) & (n < hidden)
        if dx_in is not None:
            dx += _load_tile(dx_in, stride_in, m0, rows, n, shared)
        _store_tile(dx_out, stride_dx, m0, rows, n, dx, shared)
    if value is not None:
        _store_tile(value, stride_out, m0, rows, n, tl.where(n < columns, out, 0.0), inside & (n < stride_out))
    if da is not None:
        dh = tl.where(inside & (n < columns), dh, 0.0)
        _store_tile(da, stride_out, m0, rows, n, dh, inside & (n < stride_out))
        if sums is not None:
            n = n0 + tl.arange(0, BN)
            row_block = (m0 // BM).to(tl.int64)
            tl.store(sums + row_block * stride_out + n, tl.sum(dh, axis=0), mask=n < stride_out)


@triton.jit
def _linear_bwd_halves(
    acc, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
    tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr, READS_H: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    if SPLIT == 1:
        _linear_bwd_columns(
            acc, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
            tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H,
        )  # fmt: skip
    else:
        left, right = _halves(acc)
        _linear_bwd_columns(
            left, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
            tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H,
        )  # fmt: skip
        _linear_bwd_columns(
            right, n0 + acc.shape[1] // 2, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out,
            stride_dx, code, tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H,
        )  # fmt: skip


@triton.jit
def linear_bwd_epilogue(
    acc, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
    tokens, columns, hidden,
    SEGMENT: tl.constexpr, SLOTS: tl.constexpr, EVALUATE: tl.constexpr, READS_X: tl.constexpr, READS_H: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The backward segment and the stores of `ffn_linear_bwd_kernel`."""
    if SPLIT == 4:
        left, right = _halves(acc)
        _linear_bwd_halves(
            left, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
            tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H, 2,
        )  # fmt: skip
        _linear_bwd_halves(
            right, n0 + acc.shape[1] // 2, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out,
            stride_dx, code, tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H, 2,
        )  # fmt: skip
    else:
        _linear_bwd_halves(
            acc, n0, m0, value, da, stride_out, sums, x, stride_x, h, dx_in, stride_in, dx_out, stride_dx, code,
            tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H, SPLIT,
        )  # fmt: skip
