"""Grouped FFN: several stacks of FFNs, each with its own widths, depth and program, in one launch.

A member is one `FFNCall`; members agree in device and compute dtype only. Forward is one launch
(csrc/cuda/grouped_fwd), backward three (grouped_bwd: gradients down to the inputs; grouped_weights: weight gradients,
and the second stage of the column sums), however many members there are.

    forward   a block owns 64, 32 or 16 rows of a member through its stack; operands of products stay in shared memory
    saved     per layer: the layer's input (but not x itself), h and y (y1 and y2), mean and rstd of the rows
    backward  the same blocks from the last layer to the first; recomputes z, m and p, regenerates dropout

Sums run in a fixed order for one device and one set of sizes: the same bits on every run. No atomics.

Blocks get as many rows as fit into shared memory, fewer where that would leave multiprocessors without a block. More
than 16 members, or 64 layers in all, are split into several launches.

Rejected: one launch per phase with all members in it (as many launches as the deepest stack has phases), and a table of
members in device memory, which costs a copy per call; the record travels as a kernel argument.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels.call import FFNCall
from kernels.cuda.library import (
    DTYPE_CODES,
    Device,
    check,
    device_index,
    device_of,
    library,
    stream_of,
)
from kernels.cuda.programs import device_program
from kernels.language.program import MAX_TEMPORARIES, Flag
from kernels.reference.philox import drop_threshold

MAX_MEMBERS, MAX_LAYERS = 16, 64
"""Most members, and layers of all members together, of one launch."""
_ROWS = {torch.float32: (32, 16), torch.bfloat16: (64, 32, 16), torch.float16: (64, 32, 16)}
_WARPS = 8
_NO_VIEW = (0, 0, 0)


def supports(calls: Sequence[FFNCall]) -> str | None:
    """None when one launch can serve the members, else one line saying why not. Never looks at numbers of tokens."""
    first = calls[0]
    for call in calls:
        if call.x.device != first.x.device or call.compute_dtype != first.compute_dtype:
            return "members of one launch share device and compute dtype"
        for dtype in (call.x.dtype, call.compute_dtype):
            if dtype not in DTYPE_CODES:
                return f"its kernels have float32, bfloat16 and float16, not {dtype}"
    limit = device_of(first.x.device).block_shared
    for call in calls:
        for backward in (False, True):
            if _shared([call], _ROWS[call.compute_dtype][-1], MAX_TEMPORARIES, backward) > limit:
                return f"H={call.hidden}, d={call.inner} do not fit into {limit} bytes of shared memory"
    return None


def saved_like(call: FFNCall) -> list[Tensor]:
    """Uninitialized tensors of what `forward` saves of a member."""
    x, tokens = call.x, call.tokens
    first = call.hidden if call.flags & Flag.PARALLEL else call.inner
    like = []
    for layer in range(call.layers):
        if layer > 0:
            like.append(x.new_empty((tokens, call.hidden)))
        like += [x.new_empty((tokens, width), dtype=call.compute_dtype) for width in (first, call.hidden)]
        if call.has_ln:
            like.append(x.new_empty((tokens, 2), dtype=torch.float32))
    return like


def forward(calls: Sequence[FFNCall], save: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """(outputs [T_k, H_k] in x.dtype, per member the tensors saved for `backward`, or empty lists)."""
    outs = [call.x.new_empty((call.tokens, call.hidden)) for call in calls]
    kept = [saved_like(call) if save else [] for call in calls]
    for members in _launches(calls):
        record = _Record([calls[k] for k in members], backward=False)
        for k in members:
            views = _saved_views(calls[k], kept[k]) if save else record.unsaved(calls[k])
            layers = [(*given, *own, *_NOTHING) for given, own in zip(_parameters(calls[k]), views, strict=True)]
            record.add(calls[k], outs[k], layers)
        record.run("ffnas_grouped_forward")
    return outs, kept


def backward(
    calls: Sequence[FFNCall],
    grad_outs: Sequence[Tensor],
    saved: Sequence[Sequence[Tensor]],
    needs: Sequence[Sequence[bool]],
) -> list[list[Tensor | None]]:
    """Per member the gradients of x and `call.parameters`, None where `needs` has False; dtypes of the inputs."""
    gradients = [_gradients(call, need) for call, need in zip(calls, needs, strict=True)]
    for members in _launches(calls):
        record = _Record([calls[k] for k in members], backward=True)
        for k in members:
            call, (dx, *rest) = calls[k], gradients[k]
            groups = [rest[i : i + call.layers] for i in range(0, len(rest), call.layers)]
            groups += [[None] * call.layers] * (6 - len(groups))
            layers = []
            for layer, (parameters, own) in enumerate(
                zip(_parameters(call), _saved_views(call, saved[k]), strict=True)
            ):
                wanted = [_address(group[layer]) for group in groups]
                layers.append((*parameters, *own, *record.operands(call), *wanted))
            record.add(call, grad_outs[k], layers, dx)
        record.run("ffnas_grouped_backward")
    return gradients


_NOTHING = (0,) * 10
"""The words of a layer that forward has no use for."""


class _Record:
    """The words of one launch, and the scratch tensors they point to."""

    def __init__(self, calls: Sequence[FFNCall], backward: bool) -> None:
        first = calls[0]
        self.device, self.dtype, self.is_backward = first.x.device, first.compute_dtype, backward
        programs = [device_program(call.program, self.device) for call in calls]
        self.programs = iter(programs)
        limits = device_of(self.device)
        self.slots = max(p.temporaries for p in programs)
        self.rows = _rows_of_block(calls, self.slots, backward, limits)
        self.region = max(_region(call, self.rows, backward) for call in calls)
        self.scratch: list[Tensor] = []
        self.blocks = self.num_layers = self.num_members = 0
        self.members, self.layers = array("q"), array("q")

    def add(self, call: FFNCall, out: Tensor, layers: Sequence[Sequence[int]], dx: Tensor | None = None) -> None:
        """Appends a member; `out` is its output's gradient in backward."""
        words, _ = next(self.programs)
        blocks = -(-call.tokens // self.rows)
        g = partial = 0
        if self.is_backward:
            g = self._take(call, (call.tokens, call.hidden), torch.float32)
            partial = self._take(call, (blocks, call.layers, 2, -(-call.hidden // 4) * 4), torch.float32)
        threshold, scale = (drop_threshold(call.p_drop), _scale(call.p_drop)) if call.seed is not None else (0, 0)
        norm = DTYPE_CODES[call.ln_weight[0].dtype] if call.has_ln else 0
        self.members.extend(
            (
                *_view(call.x), *_view(out), *(_NO_VIEW if dx is None else _view(dx)), g, partial, words.data_ptr(),
                _address(call.seed), threshold, scale, _double(call.eps), call.tokens, call.hidden, call.inner,
                call.layers, self.num_layers, self.blocks, DTYPE_CODES[call.w1[0].dtype], norm,
            )
        )  # fmt: skip
        for layer in layers:
            self.layers.extend(layer)
        self.blocks += blocks
        self.num_layers += call.layers
        self.num_members += 1

    def operands(self, call: FFNCall) -> list[int]:
        """Addresses of a layer's operands of weight gradients: grad_first, grad_second, p, m."""
        parallel = bool(call.flags & Flag.PARALLEL)
        first, second = (call.hidden if parallel else call.inner), call.hidden
        mid = call.hidden if parallel else call.inner
        return [self._take(call, (call.tokens, w), call.compute_dtype) for w in (first, second, call.hidden, mid)]

    def unsaved(self, call: FFNCall) -> list[tuple[int, int, int, int]]:
        """Addresses as of `_saved_views` where nothing is kept: layers share buffers, h of the serial form has none."""
        shape = (call.tokens, call.hidden)
        between = [self._take(call, shape, call.x.dtype) for _ in range(min(2, call.layers - 1))]
        second = self._take(call, shape, call.compute_dtype)
        first = self._take(call, shape, call.compute_dtype) if call.flags & Flag.PARALLEL else 0
        return [(between[layer % 2 - 1] if layer else 0, first, second, 0) for layer in range(call.layers)]

    def run(self, name: str) -> None:
        head = (
            self.num_members, self.num_layers, self.slots, self.rows, self.blocks, DTYPE_CODES[self.dtype], self.region,
            device_index(self.device), stream_of(self.device) or 0,
        )  # fmt: skip
        words = array("q", head) + self.members + self.layers
        check(getattr(library(self.device), name)(*words.buffer_info()), "grouped kernel")

    def _take(self, call: FFNCall, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        self.scratch.append(call.x.new_empty(shape, dtype=dtype))
        return self.scratch[-1].data_ptr()


def _launches(calls: Sequence[FFNCall]) -> list[list[int]]:
    """Members with tokens, costliest first, cut into launches."""
    order = [k for k, call in enumerate(calls) if call.tokens]
    order.sort(key=lambda k: -calls[k].layers * calls[k].inner * calls[k].hidden)
    launches: list[list[int]] = []
    room = 0
    for k in order:
        if not launches or len(launches[-1]) == MAX_MEMBERS or calls[k].layers > room:
            launches.append([])
            room = MAX_LAYERS
        launches[-1].append(k)
        room -= calls[k].layers
    return launches


def _rows_of_block(calls: Sequence[FFNCall], slots: int, backward: bool, device: Device) -> int:
    """The most rows that fit and leave no multiprocessor without a block; the fewest where no number does."""
    choices = _ROWS[calls[0].compute_dtype]
    for rows in choices:
        fits = _shared(calls, rows, slots, backward) <= device.block_shared
        if fits and sum(-(-call.tokens // rows) for call in calls) >= device.multiprocessors:
            return rows
    return choices[-1]


def _shared(calls: Sequence[FFNCall], rows: int, slots: int, backward: bool) -> int:
    opened = library(calls[0].x.device)
    shared = opened.ffnas_grouped_bwd_shared if backward else opened.ffnas_grouped_fwd_shared
    return shared(
        DTYPE_CODES[calls[0].compute_dtype], rows, slots, max(_region(call, rows, backward) for call in calls)
    )


def _region(call: FFNCall, rows: int, backward: bool) -> int:
    """Bytes of a block's two operands, or of its row phase where that takes more (csrc/cuda/grouped.cuh)."""
    other = call.hidden if call.flags & Flag.PARALLEL else call.inner
    strides = sum(-(-width // 32) * 32 + 8 for width in (call.hidden, other))
    row_phase = _WARPS * -(-call.hidden // 4) * 16 * (3 if backward else 1)
    return -(-max(rows * strides * call.compute_dtype.itemsize, row_phase) // 16) * 16


def _parameters(call: FFNCall) -> list[tuple[int, ...]]:
    """Per layer the addresses of the six parameters, and row strides of w1 and w2."""
    norms = (call.ln_weight, call.ln_bias) if call.has_ln else ([None] * call.layers,) * 2
    groups = (call.w1, call.b1, call.w2, call.b2, *norms)
    return [
        (*(_address(group[layer]) for group in groups), call.w1[layer].stride(0), call.w2[layer].stride(0))
        for layer in range(call.layers)
    ]


def _saved_views(call: FFNCall, saved: Sequence[Tensor]) -> list[tuple[int, int, int, int]]:
    """Per layer the addresses of its input, first and second product, and statistics."""
    rest = iter(saved)
    views = []
    for layer in range(call.layers):
        kept = (layer > 0, True, True, call.has_ln)
        views.append(tuple(_address(next(rest)) if k else 0 for k in kept))
    return views  # type: ignore[return-value]


def _gradients(call: FFNCall, needs: Sequence[bool]) -> list[Tensor | None]:
    inputs = [call.x, *call.parameters]
    make = torch.empty if call.tokens else torch.zeros
    return [
        make(t.shape, dtype=t.dtype, device=t.device) if need else None for t, need in zip(inputs, needs, strict=True)
    ]


def _view(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), DTYPE_CODES[t.dtype]


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


@lru_cache(maxsize=64)
def _double(value: float) -> int:
    """The bits of a double."""
    return struct.unpack("q", struct.pack("d", value))[0]


@lru_cache(maxsize=64)
def _scale(p_drop: float) -> int:
    return _double(0.0 if p_drop >= 1.0 else 1.0 / (1.0 - p_drop))
