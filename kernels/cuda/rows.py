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
from types import SimpleNamespace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.call import FFNCall
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
    library,
    stream_of,
    view,
)
from kernels.cuda.programs import device_program as copy_of
from kernels.language.program import MAX_TEMPORARIES, Flag

_NARROW_ROWS = 4
"""Rows a block of one-warp teams works on at a time."""
_MAX_RESIDENT = 8


class Needs(Protocol):
    """Which parameter gradients of a layer are wanted; `kernels.triton.rows.Needs` is one."""

    b1: bool
    b2: bool
    ln_weight: bool
    ln_bias: bool


_ALL = SimpleNamespace(b1=True, b2=True, ln_weight=True, ln_bias=True)


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
    y: Tensor | None,
    y2: Tensor | None,
    stats: Tensor | None,
    device_program: object,
    needs: Needs | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dy, dy2 or None, dx_partial or None, dgamma, dbeta, db_y, db_y2).

    dy and dy2 [T, H] are in the compute dtype, rows a multiple of 16 bytes; dx_partial [T, H] is float32: LayerNorm's
    input gradient and post's share, None where there is neither. The sums [H] have the dtypes of the parameters they
    are gradients of, None where not wanted: db_y is that of b2 (parallel form: b1), db_y2 that of b2 (parallel form
    only).

    Args:
        grad_out: [T, H], any dtype with stride(1) == 1.
        y, y2: as in `forward`; None where neither LayerNorm's input nor post's gradient reads them.
        stats: what `forward` saved; None computes them again.
        needs: which parameter gradients are wanted; None for all.
    """
    tokens, hidden, device = x.shape[0], call.hidden, x.device
    parallel = bool(call.flags & Flag.PARALLEL)
    dy = _aligned(x, tokens, hidden, call.compute_dtype)
    dy2 = _aligned(x, tokens, hidden, call.compute_dtype) if parallel else None
    dx = None
    if call.has_ln or call.flags & Flag.POST_USES_X:
        dx = x.new_empty((tokens, hidden), dtype=torch.float32)
    likes = _sum_likes(call, layer, needs)
    make = torch.empty if tokens else torch.zeros
    sums = [None if t is None else make(hidden, dtype=t.dtype, device=device) for t in likes]
    if tokens:
        words, temporaries = copy_of(call.program, device)
        plan = _plan(call, tokens, temporaries, backward=True)
        rows = _rows(call, layer, x, y, y2, stats)
        rows.grad, rows.dy, rows.dy2, rows.dx = view(grad_out), view(dy), view(dy2), view(dx)
        record = _record(call, plan, rows, words, tokens)
        record.sums = (View * ROW_SUMS)(*(view(t) for t in sums))
        kinds = ROW_SUMS if parallel else ROW_SUMS - 1
        partial = x.new_empty((plan.blocks, kinds, -(-hidden // 4) * 4), dtype=torch.float32)
        record.partial = partial.data_ptr()
        check(library(device).ffnas_rows_backward(byref(record)), "row kernel, backward")
    dgamma, dbeta, db_y, db_y2 = sums
    return dy, dy2, dx, dgamma, dbeta, db_y, db_y2


def _sum_likes(call: FFNCall, layer: int, needs: Needs | None) -> list[Tensor | None]:
    """The parameters whose gradients are column sums, in the order of the kernel's sums; None where not wanted."""
    wanted = needs or _ALL
    norm = [(call.ln_weight, wanted.ln_weight), (call.ln_bias, wanted.ln_bias)]
    if call.flags & Flag.PARALLEL:
        biases = [(call.b1, wanted.b1), (call.b2, wanted.b2)]
    else:
        biases = [(call.b2, wanted.b2), ((), False)]
    return [group[layer] if want and len(group) else None for group, want in (*norm, *biases)]


def _aligned(x: Tensor, tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Uninitialized [tokens, hidden] whose rows start at multiples of 16 bytes: the next product reads them."""
    return x.new_empty((tokens, -(-hidden // 8) * 8), dtype=dtype)[:, :hidden]


def _rows(call: FFNCall, layer: int, x: Tensor, y: Tensor | None, y2: Tensor | None, stats: Tensor | None) -> Rows:
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
    """As many slots as the program uses; a grid that fills the device once. The same in a captured graph."""
    device, slots = device_of(call.x.device), temporaries
    shared = _shared(call, slots, False, backward)
    wide = 2 * shared > device.multiprocessor_shared or shared > device.block_shared
    if wide:
        shared = _shared(call, slots, True, backward)
    rows = 1 if wide else _NARROW_ROWS
    return _Plan(slots, wide, min(-(-tokens // rows), _resident(device, shared) * device.multiprocessors))


def _resident(device: Device, shared: int) -> int:
    """Blocks a multiprocessor holds; each also takes 1 KB for the system."""
    return max(1, min(_MAX_RESIDENT, device.multiprocessor_shared // (shared + 1024)))
