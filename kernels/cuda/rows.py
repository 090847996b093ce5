"""The row kernels: post segment, dropout, residual and LayerNorm, forward and backward (csrc/cuda/rows.cu).

    forward     v = post(x, y[, y2]);  z = x + dropout(v);  out = LayerNorm(z)          bare expression: out = v
    backward    dz = LayerNorm's input gradient;  dy[, dy2], dx = post_bwd(x, y[, y2], dropout(dz));  dx += dz

Saved: mean and rstd of each row. z is computed again from x, y and the program; dropout masks from the seed. The
interface is that of `kernels.triton.rows`, so that either can stand in the FFN's sequence of launches.

A row is served by a warp, or by a whole block where a warp's share of shared memory would leave fewer than two blocks
per multiprocessor (backward: wider than about 1,000 columns). Column sums (db2, dgamma, dbeta) are summed by block and
then over blocks in a fixed order: the same bits on every run on one kind of device.

Rejected: a grid of one block per few rows for backward; its partial sums would outweigh the data.
"""

from __future__ import annotations

from ctypes import byref
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backends.base import FFNCall
from kernels.cuda.library import (
    DTYPE_CODES,
    ROW_SUMS,
    Device,
    RowCall,
    Rows,
    View,
    check,
    device_index,
    device_of,
    dropout,
    is_capturing,
    library,
    stream_of,
    view,
)
from kernels.cuda.programs import device_program as copy_of
from kernels.program import MAX_TEMPORARIES

_NARROW_ROWS = 4
"""Rows a block of one-warp teams works on at a time."""
_MAX_RESIDENT = 8


class _Plan(NamedTuple):
    slots: int
    wide: bool
    blocks: int


def supports(call: FFNCall) -> str | None:
    """None when `forward` and `backward` can serve the call, else one line saying why not."""
    for dtype in (call.x.dtype, call.compute_dtype):
        if dtype not in DTYPE_CODES:
            return f"its kernels have float32, bfloat16 and float16, not {dtype}"
    limit = device_of(call.x.device).block_shared
    if _shared(call, MAX_TEMPORARIES, True, True) > limit:
        return f"rows of {call.hidden} columns do not fit into {limit} bytes of shared memory"
    return None


def forward(
    call: FFNCall, layer: int, x: Tensor, y: Tensor, y2: Tensor | None, device_program: object, save_stats: bool
) -> tuple[Tensor, Tensor | None]:
    """(out [T, H] in x.dtype, mean and rstd [T, 2] float32, or None).

    Args:
        call: the call; `layer` chooses LayerNorm's parameters and the dropout stream.
        x: [T, H], the layer's input.
        y, y2: [T, H] in the compute dtype, the products; y2 only in the parallel form.
        device_program: not used: these kernels read the program's own words (`kernels.cuda.programs`).
        save_stats: whether the statistics are wanted; None comes back without LayerNorm.
    """
    tokens = x.shape[0]
    out = x.new_empty((tokens, call.hidden))
    stats = x.new_empty((tokens, 2), dtype=torch.float32) if save_stats and call.has_ln else None
    if tokens:
        words, temporaries = copy_of(call.program, x.device)
        plan = _plan(call, tokens, temporaries, backward=False)
        rows = _rows(call, layer, x, y, y2, stats)
        rows.out = view(out)
        record = _record(call, plan, rows, words, tokens)
        check(library(x.device).ffnas_rows_forward(byref(record)), "row kernel")
    return out, stats


def backward(
    call: FFNCall,
    layer: int,
    grad_out: Tensor,
    x: Tensor,
    y: Tensor,
    y2: Tensor | None,
    stats: Tensor | None,
    device_program: object,
    needs: object = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """(dy, dy2 or None, dx_partial, dgamma or None, dbeta or None, db of y, db of y2 or None).

    dy and dy2 [T, H] are in the compute dtype; dx_partial [T, H] is float32: LayerNorm's input gradient and post's
    share. The sums [H] have the dtypes of the parameters they are gradients of; db of y is db2's in the serial form and
    db1's in the parallel form, where db of y2 is db2's.

    Args:
        grad_out: [T, H], any dtype with stride(1) == 1.
        stats: what `forward` saved; None computes them again.
        needs: not used: what this kernel could leave out costs less than asking.
    """
    tokens, hidden, device = x.shape[0], call.hidden, x.device
    dy = x.new_empty((tokens, hidden), dtype=call.compute_dtype)
    dy2 = torch.empty_like(dy) if y2 is not None else None
    dx = x.new_empty((tokens, hidden), dtype=torch.float32)
    make = torch.empty if tokens else torch.zeros
    norm = [make(hidden, dtype=t[layer].dtype, device=device) for t in (call.ln_weight, call.ln_bias) if len(t)]
    dgamma, dbeta = norm or (None, None)
    biases = [call.b2[layer]] if y2 is None else [call.b1[layer], call.b2[layer]]
    db, db_second = ([make(hidden, dtype=b.dtype, device=device) for b in biases] + [None])[:2]
    if tokens:
        words, temporaries = copy_of(call.program, device)
        plan = _plan(call, tokens, temporaries, backward=True)
        rows = _rows(call, layer, x, y, y2, stats)
        rows.grad, rows.dy, rows.dy2, rows.dx = view(grad_out), view(dy), view(dy2), view(dx)
        record = _record(call, plan, rows, words, tokens)
        record.sums = (View * ROW_SUMS)(*(view(t) for t in (dgamma, dbeta, db, db_second)))
        kinds = ROW_SUMS if y2 is not None else ROW_SUMS - 1
        partial = x.new_empty((plan.blocks, kinds, -(-hidden // 4) * 4), dtype=torch.float32)
        record.partial = partial.data_ptr()
        check(library(device).ffnas_rows_backward(byref(record)), "row kernel, backward")
    assert db is not None
    return dy, dy2, dx, dgamma, dbeta, db, db_second


def _rows(call: FFNCall, layer: int, x: Tensor, y: Tensor, y2: Tensor | None, stats: Tensor | None) -> Rows:
    norm = [view(t[layer]) if len(t) else View() for t in (call.ln_weight, call.ln_bias)]
    rows = Rows(view(x), view(y), view(y2), *norm, hidden=call.hidden, eps=call.eps, dropout=dropout(call, layer))
    rows.stats = None if stats is None else stats.data_ptr()
    return rows


def _record(call: FFNCall, plan: _Plan, rows: Rows, words: Tensor, tokens: int) -> RowCall:
    device = call.x.device
    return RowCall(
        rows=rows,
        program=words.data_ptr(),
        tokens=tokens,
        slots=plan.slots,
        blocks=plan.blocks,
        wide=plan.wide,
        device=device_index(device),
        stream=stream_of(device),
    )


def _shared(call: FFNCall, slots: int, wide: bool, backward: bool) -> int:
    return library(call.x.device).ffnas_rows_shared(call.hidden, slots, wide, backward)


def _plan(call: FFNCall, tokens: int, temporaries: int, backward: bool) -> _Plan:
    """As many slots as the program uses, or all in a captured graph (its program may change); a grid that fills the
    device once."""
    device = device_of(call.x.device)
    slots = MAX_TEMPORARIES if is_capturing(call.x.device) else temporaries
    shared = _shared(call, slots, False, backward)
    wide = 2 * shared > device.multiprocessor_shared or shared > device.block_shared
    if wide:
        shared = _shared(call, slots, True, backward)
    rows = 1 if wide else _NARROW_ROWS
    return _Plan(slots, wide, min(-(-tokens // rows), _resident(device, shared) * device.multiprocessors))


def _resident(device: Device, shared: int) -> int:
    """Blocks a multiprocessor holds; each also takes 1 KB for the system."""
    return max(1, min(_MAX_RESIDENT, device.multiprocessor_shared // (shared + 1024)))
