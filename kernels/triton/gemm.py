"""The three products of the FFN op as Triton kernels, with a program's segment as epilogue.

    ffn_linear_kernel        out = f(a @ w.T + bias)      a [T, K], w [N, K]; f is nothing, or mid(x, h)
    ffn_linear_bwd_kernel    g @ w, then a backward segment   g [T, K], w [K, N]
    ffn_weight_grad_kernel   left.T @ right over tokens    left [T, M], right [T, N]; partial sums per group of tokens

Accumulation and epilogues are float32; operands have one dtype (float32, float16, bfloat16).

Widths such as 540, 270 or 135 have rows that are not 16-byte aligned. A kernel is told how many elements divide every
row stride and bound of an operand (ALIGN_*: 8, 4, 2 or 1; sizes are passed in that unit), and so loads 16, 8 or 4 bytes
at a time with asynchronous copies and exact masks. Buffers of our own (h, m, dh, y) have rows rounded up to 16 bytes,
with zeros in the surplus columns, so that they are always loaded 16 bytes at a time. Nothing of the caller's is copied.

`pre` is not computed here: every column block would compute it again (nine times for 540 columns in blocks of 64), and
its operand would pass through registers instead of being copied straight to shared memory. It is one elementwise pass
(`kernels.triton.rows`), and none where it is the identity.

The accumulator goes to the epilogue in SPLIT parts, so that the tiles of the interpreting machine stay in registers.

Rejected: tensor-memory-accelerator descriptors. They need 16-byte row strides, which most widths here do not have.
"""

# ruff: noqa: ANN001, ANN201, ANN202 - arguments of Triton functions are tensors, pointers and scalars of any type
from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.epilogues import linear_bwd_epilogue, linear_epilogue


@triton.jit
def _multiply(
    a, stride_a, width_a, b, stride_b, width_b, depth, m0, tokens, n0, columns,
    ROWS_ARE_COLUMNS: tl.constexpr, PEEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The [BM, BN] block at (m0, n0) of a @ b.T (b [columns, depth]) or, without ROWS_ARE_COLUMNS, a @ b.

    width_a, width_b: columns that may be read; beyond `depth` those of a are zeros. Rows past the last are the last.
    PEEL (of a @ b.T): the last, partial step stands apart, so that the others need no mask along b's rows: a mask
    that ends at an odd column would have every element loaded alone.
    """
    # Rows past the end repeat the last one (b's too, where they are columns of the result): no masks along them, and
    # nobody stores what comes of it. Along the depth zeros on one side are enough.
    rows = tl.minimum(tl.arange(0, BM), tokens - 1 - m0)
    k = tl.arange(0, BK)
    a_tile = a + m0.to(tl.int64) * stride_a + (rows[:, None] * stride_a + k[None, :])
    if ROWS_ARE_COLUMNS:
        n = tl.minimum(n0 + tl.arange(0, BN), columns - 1)
        b_tile = b + (n[None, :].to(tl.int64) * stride_b + k[:, None])
        b_step = BK
    else:
        n = n0 + tl.arange(0, BN)
        b_tile = b + (k[:, None].to(tl.int64) * stride_b + n[None, :])
        b_step = BK * stride_b
    # K is walked in steps of BK; Triton fetches the tiles of the next steps into shared memory while this one
    # multiplies.
    acc = tl.zeros((BM, BN), tl.float32)
    end = depth
    if PEEL:
        end = depth // BK * BK
    for start in range(0, end, BK):
        left = tl.load(a_tile, mask=k[None, :] < width_a - start, other=0.0)
        if PEEL:
            right = tl.load(b_tile)
        elif ROWS_ARE_COLUMNS:
            right = tl.load(b_tile, mask=k[:, None] < width_b - start, other=0.0)
        else:
            right = tl.load(b_tile, mask=(k[:, None] < depth - start) & (n[None, :] < width_b), other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a_tile += BK
        b_tile += b_step
    if PEEL:
        left = tl.load(a_tile, mask=k[None, :] < width_a - end, other=0.0)
        right = tl.load(b_tile, mask=k[:, None] < width_b - end, other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _block(columns, BM: tl.constexpr, BN: tl.constexpr):
    """First row and column of a program's block. Blocks of the same rows follow one another: they share a's tile.

    One axis for both: a grid's other axes end at 65,535 programs, which are 2.1 million tokens in blocks of 32.
    """
    across = tl.cdiv(columns, BN)
    return tl.program_id(0) // across * BM, tl.program_id(0) % across * BN


@triton.jit(
    do_not_specialize=[
        "units_a",
        "width_a",
        "units_w",
        "depth_units",
        "units_out",
        "units_x",
        "tokens",
        "columns",
        "hidden",
    ]
)
def ffn_linear_kernel(
    a, w, bias, out, saved_h, x, code,
    units_a, width_a, units_w, depth_units, units_out, units_x, tokens, columns, hidden,
    EVALUATE: tl.constexpr, SEGMENT: tl.constexpr, SLOTS: tl.constexpr, READS_X: tl.constexpr,
    ALIGN_A: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_DEPTH: tl.constexpr, ALIGN_X: tl.constexpr,
    ALIGN_OUT: tl.constexpr, PEEL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = f(a @ w.T + bias).

    Args:
        a: [tokens, K], width_a readable columns, zeros past K; w: [columns, K]; bias: [columns].
        out, saved_h: [tokens, columns] with row stride units_out * ALIGN_OUT; surplus columns get zeros.
        x: [tokens, hidden], read where READS_X; code: device words of the program.
        units_*, width_a: row strides and widths in units of ALIGN_A (a), ALIGN_W (w), ...; depth_units is K.
        PEEL: see `_multiply`.
        EVALUATE: an evaluator (`kernels.triton.evaluate`), or None for f the identity.
    """
    m0, n0 = _block(columns, BM, BN)
    stride_out = units_out * ALIGN_OUT
    depth = depth_units * ALIGN_DEPTH
    acc = _multiply(
        a, units_a * ALIGN_A, width_a * ALIGN_A, w, units_w * ALIGN_W, depth, depth, m0, tokens, n0, columns,
        True, PEEL, BM, BN, BK, PRECISION,
    )  # fmt: skip
    linear_epilogue(
        acc, n0, m0, out, stride_out, saved_h, bias, x, units_x * ALIGN_X, code, tokens, columns, hidden,
        SEGMENT, SLOTS, EVALUATE, READS_X, SPLIT,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "units_g", "width_g", "units_w", "width_w", "units_out", "units_x", "units_in", "units_dx", "tokens", "depth",
        "columns", "hidden",
    ]
)  # fmt: skip
def ffn_linear_bwd_kernel(
    g, w, x, h, dx_in, value, da, sums, dx_out, code,
    units_g, width_g, units_w, width_w, units_out, units_x, units_in, units_dx,
    tokens, depth, columns, hidden,
    EVALUATE: tl.constexpr, SEGMENT: tl.constexpr, SLOTS: tl.constexpr, READS_X: tl.constexpr, READS_H: tl.constexpr,
    ALIGN_G: tl.constexpr, ALIGN_W: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_IN: tl.constexpr,
    ALIGN_OUT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A backward segment on G = g @ w.

    Args:
        g: [tokens, depth], width_g readable columns, zeros past depth; w: [depth, columns], width_w readable.
        x: [tokens, hidden], h: [tokens, columns]: read where READS_X, READS_H.
        value, da: [tokens, columns], or None: the segment's value and its gradient for A; the surplus gets zeros.
        sums: float32 [row blocks, row stride of da], or None: column sums of da, one row per block of tokens.
        dx_in: float32 [tokens, hidden], or None; dx_out: the same in any dtype: dx_in + the gradient for X, in the
            columns that x and the product have in common. May be dx_in itself.
        ALIGN_OUT: of value, da, h; ALIGN_IN: of dx_in and dx_out; ALIGN_X: of x. The rest is as in `ffn_linear_kernel`.
    """
    m0, n0 = _block(columns, BM, BN)
    acc = _multiply(
        g, units_g * ALIGN_G, width_g * ALIGN_G, w, units_w * ALIGN_W, width_w * ALIGN_W, depth, m0, tokens, n0,
        columns, False, False, BM, BN, BK, PRECISION,
    )  # fmt: skip
    linear_bwd_epilogue(
        acc, n0, m0, value, da, units_out * ALIGN_OUT, sums, x, units_x * ALIGN_X, h, dx_in, units_in * ALIGN_IN,
        dx_out, units_dx * ALIGN_IN, code, tokens, columns, hidden, SEGMENT, SLOTS, EVALUATE, READS_X, READS_H, SPLIT,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["units_left", "width_left", "units_right", "width_right", "tokens", "group", "rows", "columns"]
)
def ffn_weight_grad_kernel(
    left, right, out, units_left, width_left, units_right, width_right, tokens, group, rows, columns,
    ALIGN_LEFT: tl.constexpr, ALIGN_RIGHT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[s] = left[s * group : (s + 1) * group].T @ right[same]; out is [groups, rows, columns], contiguous.

    width_left, width_right: columns of left and right that may be read (at least rows and columns).
    """
    # The depth of this product is the tokens, many times what M x N blocks can keep busy: groups of tokens run beside
    # each other, each into a sum of its own, and ffn_reduce_kernel adds those in a fixed order.
    n0 = tl.program_id(0) * BN
    m0 = tl.program_id(1) * BM
    first = tl.program_id(2) * group
    stride_left = units_left * ALIGN_LEFT
    stride_right = units_right * ALIGN_RIGHT
    m = m0 + tl.arange(0, BM)[None, :]
    n = n0 + tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)[:, None]
    left_tile = left + first.to(tl.int64) * stride_left + (k * stride_left + m)
    right_tile = right + first.to(tl.int64) * stride_right + (k * stride_right + n)
    count = tl.minimum(group, tokens - first)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, count, BK):
        inside = k < count - start  # tokens of another group, or past the last, count as zeros
        a = tl.load(left_tile, mask=inside & (m < width_left * ALIGN_LEFT), other=0.0)
        b = tl.load(right_tile, mask=inside & (n < width_right * ALIGN_RIGHT), other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        left_tile += BK * stride_left
        right_tile += BK * stride_right
    m = (m0 + tl.arange(0, BM))[:, None]
    target = out + tl.program_id(2).to(tl.int64) * rows * columns + (m * columns + n)
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < rows) & (n < columns))


@triton.jit(do_not_specialize=["size", "count", "stride"])
def ffn_reduce_kernel(parts, out, size, count, stride, BP: tl.constexpr, BN: tl.constexpr):
    """out[i] = sum of parts[p * stride + i] over p < count, in a fixed order; float32 parts, i < size."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    p = tl.arange(0, BP)[:, None]
    total = tl.zeros((BP, BN), tl.float32)
    for start in range(0, count, BP):
        at = (start + p).to(tl.int64) * stride + n[None, :]
        total += tl.load(parts + at, mask=(p < count - start) & (n[None, :] < size), other=0.0)
    tl.store(out + n, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=n < size)
