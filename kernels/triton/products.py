"""Launches of the products of `kernels.triton.gemm`: strides, alignments, and what each form of a call needs.

Rounding of parameters, and of nothing else, may copy: where their dtype is not that of the products (autocast).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.call import FFNCall
from kernels.language.program import Flag, Segment
from kernels.triton import gemm, tuning
from kernels.triton.device_program import DeviceProgram
from kernels.triton.launch import launch
from kernels.triton.layout import PAD, alignment, allows_tf32, padded
from kernels.triton.rows import reduce_parts


class Operand(NamedTuple):
    """A [T, K] matrix with `width` >= K readable columns; those past K hold zeros."""

    tensor: Tensor
    width: int


def weight(call: FFNCall, w: Tensor) -> Tensor:
    """`w` in the compute dtype: itself, or rounded into rows of `padded` length."""
    if w.dtype == call.compute_dtype:
        return w
    rows, columns = w.shape
    rounded = padded(rows, columns, call.compute_dtype, w.device)[:, :columns]
    rounded.copy_(w)
    return rounded


def precision(dtype: torch.dtype) -> str:
    """Triton's `input_precision`: "ieee" for float32 products unless PyTorch allows TF32."""
    return "tf32" if dtype != torch.float32 or allows_tf32() else "ieee"


def linear(
    call: FFNCall, a: Operand, w: Tensor, bias: Tensor, *, x: Tensor | None = None,
    program: DeviceProgram | None = None, save: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """mid(x, a @ w.T + bias), or without `program` the product alone.

    Returns:
        (out, h or None): [T, rows of w], rows padded with zeros (`kernels.triton.layout`); h, the product, if `save`.
    """
    tokens, columns, depth = call.tokens, w.shape[0], w.shape[1]
    out = padded(tokens, columns, call.compute_dtype, w.device)
    kept = torch.empty_like(out) if save else None
    evaluator = None if program is None else program.evaluator(Segment.MID)
    reads_x = evaluator is not None and bool(call.flags & Flag.MID_USES_X)
    align_a = alignment([a.width, a.tensor.stride(0)], [a.tensor])
    align_w, align_depth = alignment([w.stride(0)], [w]), alignment([depth], [w])
    # asynchronous copies take 4 bytes or more: a mask that ends at an odd column would leave none
    peel = align_depth < align_w and align_depth * w.element_size() < 4
    if not peel:
        align_w = align_depth = min(align_w, align_depth)
    align_x = alignment([call.hidden, x.stride(0)], [x]) if reads_x and x is not None else 1
    slots = 0 if evaluator is None else evaluator.slots

    def start(c: tuning.Gemm) -> None:
        launch(
            gemm.ffn_linear_kernel,
            (-(-columns // c.columns) * -(-tokens // c.rows),),
            a.tensor, w, bias, out, kept, x if reads_x else None, None if evaluator is None else evaluator.code,
            a.tensor.stride(0) // align_a, a.width // align_a, w.stride(0) // align_w, depth // align_depth,
            out.stride(0) // PAD, 0 if x is None else x.stride(0) // align_x, tokens, columns, call.hidden,
            EVALUATE=None if evaluator is None else evaluator.function,
            SEGMENT=0 if evaluator is None else evaluator.segment, SLOTS=slots,
            READS_X=reads_x, ALIGN_A=align_a, ALIGN_W=align_w, ALIGN_DEPTH=align_depth, PEEL=peel, ALIGN_X=align_x,
            ALIGN_OUT=PAD, PRECISION=precision(call.compute_dtype), **c.constants(slots),
        )  # fmt: skip

    start(tuning.chosen(tuning.family("linear", call.compute_dtype, slots, columns), w.device, start))
    return out, kept


def linear_bwd(
    call: FFNCall, g: Operand, w: Tensor, columns: int, program: DeviceProgram, segment: Segment, *, x: Tensor | None,
    h: Tensor | None = None, dx_in: Tensor | None = None, dx_out: Tensor | None = None, value: bool = False,
    da: bool = False, bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The backward segment of `segment` (PRE or MID) on G = g @ w, w [K, columns].

    Args:
        x, h: the segment's inputs; None where it has no such input.
        dx_in, dx_out: dx_out = dx_in + the segment's gradient for x, in the columns they share.
        value, da: whether the segment's value and its gradient for h are wanted.
        bias: the bias whose gradient, the column sums of da, is wanted.

    Returns:
        (value, da, gradient of the bias), None where not wanted; the first two padded with zeros.
    """
    tokens, dtype = call.tokens, call.compute_dtype
    out = padded(tokens, columns, dtype, w.device) if value else None
    gradient = padded(tokens, columns, dtype, w.device) if da else None
    stride_out = -(-columns // PAD) * PAD
    backward = Segment(segment + (Segment.PRE_BWDV if value else Segment.PRE_BWD))
    evaluator = program.evaluator(backward)
    reads_x = x is not None and (value or dx_out is not None or segment != Segment.PRE)
    align_g = alignment([g.width, g.tensor.stride(0)], [g.tensor])
    width_w = readable_width(w, columns)
    align_w = alignment([width_w, w.stride(0)], [w])
    align_x = alignment([call.hidden, x.stride(0)], [x]) if x is not None and reads_x else 1
    partials = [t for t in (dx_in, dx_out) if t is not None]
    align_in = alignment([call.hidden, *(t.stride(0) for t in partials)], partials)

    def start(c: tuning.Gemm, into: Tensor | None) -> Tensor | None:
        blocks = -(-tokens // c.rows)
        sums = None if bias is None else torch.empty((blocks, stride_out), dtype=torch.float32, device=w.device)
        launch(
            gemm.ffn_linear_bwd_kernel,
            (-(-columns // c.columns) * blocks,),
            g.tensor, w, x if reads_x else None, h, dx_in, out, gradient, sums, into, evaluator.code,
            g.tensor.stride(0) // align_g, g.width // align_g, w.stride(0) // align_w, width_w // align_w,
            stride_out // PAD, 0 if x is None else x.stride(0) // align_x,
            0 if dx_in is None else dx_in.stride(0) // align_in, 0 if into is None else into.stride(0) // align_in,
            tokens, w.shape[0], columns, call.hidden,
            EVALUATE=evaluator.function, SEGMENT=evaluator.segment, SLOTS=evaluator.slots, READS_X=reads_x,
            READS_H=h is not None, ALIGN_G=align_g, ALIGN_W=align_w, ALIGN_X=align_x, ALIGN_IN=align_in,
            ALIGN_OUT=PAD, PRECISION=precision(dtype), **c.constants(evaluator.slots),
        )  # fmt: skip
        return sums

    def trial(c: tuning.Gemm) -> None:
        start(c, None if dx_out is None else scratch)

    scratch = dx_out
    family = tuning.family("linear_bwd", dtype, evaluator.slots, columns)
    if dx_out is not None and tuning.due(family, w.device):
        scratch = torch.empty_like(dx_out)  # dx_out may be dx_in, which is added to once
    sums = start(tuning.chosen(family, w.device, trial), dx_out)
    db = None if bias is None or sums is None else reduce_parts(sums, sums.shape[0], columns, bias.dtype)
    return out, gradient, db


def weight_grad(left: Operand, right: Operand, like: Tensor) -> Tensor:
    """left.T @ right over tokens: contiguous, the shape and dtype of `like`."""
    rows, columns = like.shape
    tokens = left.tensor.shape[0]
    family = tuning.family("weight_grad", left.tensor.dtype, 0, rows, columns)
    depth = tuning.shipped(family).depth
    groups = tuning.token_groups(tokens, depth)
    share = -(-tokens // groups)
    group = -(-share // depth) * depth
    groups = -(-tokens // group)
    out = torch.empty((rows, columns), dtype=like.dtype, device=like.device)
    parts = out if groups == 1 else torch.empty((groups, rows * columns), dtype=torch.float32, device=like.device)
    align_left = alignment([left.width, left.tensor.stride(0)], [left.tensor])
    align_right = alignment([right.width, right.tensor.stride(0)], [right.tensor])

    def start(c: tuning.Gemm) -> None:
        launch(
            gemm.ffn_weight_grad_kernel,
            (-(-columns // c.columns), -(-rows // c.rows), groups),
            left.tensor, right.tensor, parts,
            left.tensor.stride(0) // align_left, left.width // align_left,
            right.tensor.stride(0) // align_right, right.width // align_right, tokens, group, rows, columns,
            ALIGN_LEFT=align_left, ALIGN_RIGHT=align_right, PRECISION=precision(left.tensor.dtype),
            **c.constants(),
        )  # fmt: skip

    start(tuning.chosen(family, like.device, start))
    return out if groups == 1 else reduce_parts(parts, groups, rows * columns, like.dtype).view(rows, columns)


def readable_width(w: Tensor, columns: int) -> int:
    """Columns of `w` a kernel may read: more than it has, up to 16 bytes' worth, where memory of its own rows follows.

    What lies there only reaches columns of a product that are not stored.
    """
    if w.stride(0) < columns or w.device.type == "meta":
        return columns
    for step in (8, 4, 2):
        width = -(-columns // step) * step
        if w.stride(0) % step == 0 and width <= w.stride(0):
            end = w.storage_offset() + (w.shape[0] - 1) * w.stride(0) + width
            if end * w.element_size() <= w.untyped_storage().nbytes():
                return width
    return columns
