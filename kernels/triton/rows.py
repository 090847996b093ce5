"""Everything of an FFN layer that works on whole rows: post segment, dropout, residual, LayerNorm; and `pre`.

The driver (`kernels.triton.ffn`) calls a `rows` object, so that another implementation can take this one's place
(`kernels.cuda.rows` has the same two methods):

    forward(call, layer, x, y, y2, device_program, save_stats) -> (out, stats)
    backward(call, layer, grad_out, x, y, y2, stats, device_program, needs)
        -> (dy, dy2, dx_partial, dgamma, dbeta, db_y, db_y2)

    call            the `FFNCall`; layer, the position in the stack: parameters, and the dropout stream
    x, grad_out     [T, H], x.dtype; last stride 1, any row stride (0 included)
    y, y2           [T, H], compute dtype, last stride 1, biases added; y2 (None in the serial form) is the parallel
                    form's second product with the row stride of y, y then the first. In backward y (and y2) is None
                    where nothing was normalized and no gradient of post reads it
    device_program  `kernels.triton.device_program.DeviceProgram`
    out             [T, H] contiguous, x.dtype: LayerNorm(x + dropout(post(x, y, y2))), or post alone without LayerNorm
    stats           float32 [T, 2]: mean, 1 / deviation of the rows under LayerNorm; or None (LayerNorm and save_stats)
    needs           `Needs`: which parameter gradients are wanted (dy and dx_partial always are)
    dy, dy2         [T, H], compute dtype, last stride 1: gradients of y and y2 (dy2 None in the serial form)
    dx_partial      float32 [T, H] contiguous: what reaches x past the products (through LayerNorm's input and post);
                    None where that is nothing
    dgamma, dbeta   [H], dtype of LayerNorm's parameters; None where not wanted
    db_y, db_y2     [H], dtype of the bias: column sums of dy and dy2. Serial: db_y is the gradient of b2; parallel:
                    db_y is that of b1, db_y2 that of b2. None where not wanted

T >= 1. `out` and `stats` are new tensors; nothing is written to an argument.

How: one program per group of rows. A row of H columns is two blocks, the largest power of two that fits and the next
power of two for the rest (540 = 512 + 28 of 32), since a single block of 1024 would leave half the lanes idle. Column
sums are kept in registers over all rows of a program, written as one partial row each and added by a second kernel in
a fixed order: deterministic, whatever torch's setting.

Dropout words are those of `kernels.reference.philox`: four neighbouring columns share one counter.

Rejected: LayerNorm in the epilogue of the second product. It needs a block as wide as H; 540 columns of accumulator
leave no registers for a program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kernels.language.program import Flag, Segment
from kernels.reference.philox import drop_threshold
from kernels.triton import row_kernels, tuning
from kernels.triton.gemm import ffn_reduce_kernel
from kernels.triton.launch import launch
from kernels.triton.layout import matrix_units, padded

if TYPE_CHECKING:
    from kernels.call import FFNCall
    from kernels.triton.device_program import DeviceProgram


class Needs(NamedTuple):
    """Parameter gradients wanted of one layer."""

    b1: bool
    b2: bool
    ln_weight: bool
    ln_bias: bool


RowGradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""dy, dy2, dx_partial, dgamma, dbeta, db_y, db_y2."""


class TritonRows:
    """The Triton implementation of the interface above."""

    def forward(
        self, call: FFNCall, layer: int, x: Tensor, y: Tensor, y2: Tensor | None, device_program: DeviceProgram,
        save_stats: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        tokens, hidden = x.shape
        out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
        stats = None
        if call.has_ln and save_stats:
            stats = torch.empty((tokens, 2), dtype=torch.float32, device=x.device)
        evaluator = device_program.evaluator(Segment.POST)
        config = tuning.rows(hidden, evaluator.slots, backward=False)
        align, units = matrix_units([x, y] if y2 is None else [x, y, y2], hidden)
        launch(
            row_kernels.ffn_rows_kernel,
            (-(-tokens // config.rows),),
            x, y, y2, out, stats, *_norm(call, layer), call.seed, device_program.code,
            units[0], units[1], tokens, hidden // align, *_dropout(call), call.eps, layer,
            EVALUATE=evaluator.function, SLOTS=evaluator.slots, ALIGN=align, DROPOUT=drop_threshold(call.p_drop) > 0,
            ROWS=config.rows, FIRST=config.first, SECOND=config.second, warps=config.warps, stages=1,
        )  # fmt: skip
        return out, stats

    def backward(
        self, call: FFNCall, layer: int, grad_out: Tensor, x: Tensor, y: Tensor | None, y2: Tensor | None,
        stats: Tensor | None, device_program: DeviceProgram, needs: Needs,
    ) -> RowGradients:  # fmt: skip
        tokens, hidden = x.shape
        parallel = bool(call.flags & Flag.PARALLEL)
        dy = padded(tokens, hidden, call.compute_dtype, x.device)
        dy2 = padded(tokens, hidden, call.compute_dtype, x.device) if parallel else None
        dx = None
        if call.has_ln or call.flags & Flag.POST_USES_X:
            dx = torch.empty((tokens, hidden), dtype=torch.float32, device=x.device)
        post, post_bwd = device_program.evaluator(Segment.POST), device_program.evaluator(Segment.POST_BWD)
        slots = max(post.slots, post_bwd.slots)
        config = tuning.rows(hidden, slots, backward=True)
        programs = min(-(-tokens // config.rows), config.programs)
        b_y, b_y2 = (call.b1, call.b2) if parallel else (call.b2, call.b2)
        wanted = [needs.ln_weight and call.has_ln, needs.ln_bias and call.has_ln]
        wanted += [needs.b1, needs.b2] if parallel else [needs.b2, False]
        sums = None
        if any(wanted):
            sums = torch.empty((4, programs, hidden), dtype=torch.float32, device=x.device)
        inputs = [t for t in (x, grad_out, y, y2) if t is not None]
        align, units = matrix_units(inputs, hidden)
        units_y = units[2] if len(units) > 2 else 0
        gamma, _ = _norm(call, layer)
        launch(
            row_kernels.ffn_rows_bwd_kernel,
            (programs,),
            grad_out, x, y, y2, stats, gamma, call.seed, device_program.code, dy, dy2, dx, sums,
            units[1], units[0], units_y, dy.stride(0) // align, tokens, hidden // align, *_dropout(call),
            layer, programs,
            EVALUATE=post_bwd.function, SLOTS=slots, ALIGN=align, DROPOUT=drop_threshold(call.p_drop) > 0,
            USES_X=bool(call.flags & Flag.POST_USES_X), PARALLEL=parallel,
            ROWS=config.rows, FIRST=config.first, SECOND=config.second, warps=config.warps, stages=1,
            **config.limits(),
        )  # fmt: skip
        norm = [call.ln_weight[layer], call.ln_bias[layer]] if call.has_ln else [b_y[layer]] * 2  # none is wanted
        dgamma, dbeta, db_y, db_y2 = (
            reduce_parts(sums[k], programs, hidden, like.dtype) if sums is not None and want else None
            for k, (want, like) in enumerate(zip(wanted, [*norm, b_y[layer], b_y2[layer]], strict=True))
        )
        return dy[:, :hidden], None if dy2 is None else dy2[:, :hidden], dx, dgamma, dbeta, db_y, db_y2


def pre_forward(call: FFNCall, x: Tensor, device_program: DeviceProgram, segment: Segment) -> Tensor:
    """A segment of x alone (pre; mid of the parallel form), rounded to the compute dtype.

    Returns:
        [T, H] with rows of `padded` length and zeros in the surplus columns.
    """
    tokens, hidden = x.shape
    out = padded(tokens, hidden, call.compute_dtype, x.device)
    evaluator = device_program.evaluator(segment)
    rows, columns, warps = tuning.elementwise(evaluator.slots)
    align, (units_x,) = matrix_units([x], hidden)
    launch(
        row_kernels.ffn_pre_kernel,
        (-(-tokens // rows), -(-out.stride(0) // columns)),
        x, out, evaluator.code, units_x, out.stride(0) // align, tokens, hidden,
        EVALUATE=evaluator.function, SEGMENT=evaluator.segment, SLOTS=evaluator.slots, ALIGN=align, BM=rows, BN=columns,
        warps=warps, stages=1,
    )  # fmt: skip
    return out


def reduce_parts(parts: Tensor, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Sum of the rows of float32 parts [count, >= size], [size] in `dtype`."""
    out = torch.empty(size, dtype=dtype, device=parts.device)
    block_p, block_n, warps = tuning.reduction(parts, count)
    launch(
        ffn_reduce_kernel, (-(-size // block_n),), parts, out, size, count, parts.stride(0),
        BP=block_p, BN=block_n, warps=warps, stages=2,
    )  # fmt: skip
    return out


def _norm(call: FFNCall, layer: int) -> tuple[Tensor | None, Tensor | None]:
    return (call.ln_weight[layer], call.ln_bias[layer]) if call.has_ln else (None, None)


def _dropout(call: FFNCall) -> tuple[int, float]:
    """(limit - 2^31, scale): a word above the limit, the threshold of `kernels.reference.philox` less one, is kept."""
    scale = 0.0 if call.p_drop >= 1.0 else 1.0 / (1.0 - call.p_drop)
    return max(drop_threshold(call.p_drop) - 1, 0) - 2**31, scale
