"""Programs on the device: a cache of copies, and buffers whose content a captured graph can be replayed for.

    with ProgramBuffer(lower("linear(gelu(linear(x,wb1)),wb2)"), "cuda") as buffer:
        ...capture a CUDA graph that calls fused_ffn with that program...
    buffer.copy_(lower("linear(relu(linear(x,wb1)),wb2)"))   # then replay: the graph runs the other program

Or, from any thread (autograd runs backward in threads of its own) and with as many buffers as a model has layers: calls
with `buffer.bound` as their program read that buffer, whatever it holds.

A copy is made once per program and device, without waiting for running kernels, and kept for good once a graph was
captured with it (`kernels.upload`). A program must have run once, or have a buffer, before a graph that uses it is
captured; who owns a buffer keeps it as long as such graphs. Kernels are loaded at their first launch, which a capture
forbids: run the call once before, with the buffer, whose slots decide on the kernels.

Rejected: passing the words as kernel arguments. They would be frozen into a captured graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language.program import Flag, Program, Segment
from kernels.triton import microcode
from kernels.triton.evaluate import interpret
from kernels.upload import Copies, upload

CACHE_SIZE = 4096
"""Device copies kept; then the less recently used half is dropped. One takes 1 to 4 KB."""

CAPACITY = 4096
"""Words of a `ProgramBuffer`, unless told otherwise."""


class Evaluator(NamedTuple):
    """What kernels take to run one segment.

    The interpreting evaluator gets a pointer to the segment's own table entry, so that one kernel serves every segment;
    a generated one knows its segments by number, and needs neither code nor slots.
    """

    function: Callable[..., object]
    slots: int
    segment: int
    code: Tensor


class DeviceProgram:
    """A program's microcode in device memory, and the evaluators of its segments.

    Attributes:
        code: int32, on the device (`kernels.triton.microcode`).
        words: the program's words.
        generated: the evaluator generated for this program, or None: the interpreting one runs.
    """

    def __init__(
        self,
        words: tuple[int, ...],
        code: Tensor,
        slots: tuple[int, ...],
        generated: Callable[..., object] | None = None,
    ) -> None:
        self.words = words
        self.code = code
        self.slots = slots
        self.generated = generated
        if generated is None:
            entries = [code[microcode.ENTRY_WORDS * k :] for k in Segment]
            self._evaluators = [Evaluator(interpret, slots[k], 0, entries[k]) for k in Segment]
        else:
            self._evaluators = [Evaluator(generated, 0, int(k), code) for k in Segment]

    def evaluator(self, segment: Segment) -> Evaluator:
        return self._evaluators[segment]


_copies: Copies[DeviceProgram] = Copies(CACHE_SIZE)
_buffers: ContextVar[tuple[ProgramBuffer, ...]] = ContextVar("ffnas_program_buffers", default=())
_bound: weakref.WeakValueDictionary[int, ProgramBuffer] = weakref.WeakValueDictionary()
"""Buffers by the address of their `bound` program's words."""
_entered: list[ProgramBuffer] = []
"""Buffers active in any thread, for backward passes: autograd runs those of CUDA tensors in a thread of its own."""


def device_program(words: tuple[int, ...], device: torch.device) -> DeviceProgram:
    """The cached device copy of a validated program; copied at its first use.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the program was never used on this device before.
    """

    def made() -> DeviceProgram:
        return DeviceProgram(words, _upload(microcode.encode(words), device), microcode.slot_variants(words))

    return _copies.get(device, words, made)


def bound_buffer(program: Tensor, device: torch.device) -> DeviceProgram | None:
    """The content of the buffer on `device` that `program`, the tensor of its `bound` program, stands for."""
    buffer = _bound.get(program.data_ptr())
    if buffer is None or buffer.device_program.code.device != device:
        return None
    return buffer.device_program


def active_buffer(words: tuple[int, ...], device: torch.device, *, backward: bool = False) -> DeviceProgram | None:
    """The content of the innermost active `ProgramBuffer` on `device` that holds this program.

    Args:
        words, device: the program's, and where it runs.
        backward: in a backward pass, which may run in another thread than the block: buffers of all threads count.
    """
    for buffer in reversed([*_entered, *_buffers.get()] if backward else _buffers.get()):
        if buffer.device_program.words == words and buffer.device_program.code.device == device:
            return buffer.device_program
    return None


def _upload(code: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "meta":
        return torch.empty(len(code), dtype=torch.int32, device=device)
    return upload(torch.tensor(code, dtype=torch.int32), device)


class ProgramBuffer:
    """One program's place in device memory, to be filled with other programs of the same kind later.

    Used as a context manager it is what calls with its program read, in this thread or task. Kernels launched for it
    have at least `slots` slots, so that programs that need more than the first one fit.

    Args:
        program: the first program.
        device: a CUDA device.
        slots: slots that kernels shall have (`kernels.triton.microcode.SLOT_VARIANTS`).
        capacity: words of the buffer.

    Attributes:
        bound: the first program, with words at an address of its own: calls with it read the buffer.

    Raises:
        ValueError: the program does not fit.
    """

    def __init__(
        self, program: Program, device: torch.device | str, *, slots: int = 6, capacity: int = CAPACITY
    ) -> None:
        if slots not in microcode.SLOT_VARIANTS:
            raise ValueError(f"slots must be one of {microcode.SLOT_VARIANTS}, got {slots}")
        self.program = program
        own = microcode.slot_variants(program.words)
        where = torch.empty(0, device=device).device
        code = torch.zeros(capacity, dtype=torch.int32, device=where)
        self.device_program = DeviceProgram(program.words, code, tuple(max(v, slots) for v in own))
        self._token: Token[tuple[ProgramBuffer, ...]] | None = None
        self._fill(program)
        self.bound = replace(program, tensor=program.tensor.clone())
        _bound[self.bound.tensor.data_ptr()] = self

    def copy_(self, program: Program) -> None:
        """Puts another program in; graphs captured with this buffer run it from the next replay on this stream.

        Raises:
            ValueError: it differs in form or flags, needs more slots than the kernels have, or does not fit.
        """
        if program.flags != self.program.flags:
            raise ValueError(
                f"the graph was captured for a program with flags {Flag(self.program.flags)!r}, this one has"
                f" {Flag(program.flags)!r}"
            )
        for have, need in zip(self.device_program.slots, microcode.slot_variants(program.words), strict=True):
            if need > have:
                raise ValueError(f"the program needs {need} slots, the buffer was made with slots={have}")
        self._fill(program)

    def _fill(self, program: Program) -> None:
        code = microcode.encode(program.words)
        target = self.device_program.code
        if len(code) > target.numel():
            raise ValueError(f"the program has {len(code)} words, the buffer holds {target.numel()}")
        host = torch.tensor(code, dtype=torch.int32)
        if target.is_cuda:
            host = host.pin_memory()  # kept alive by the stream, as PyTorch's pinned memory is
        target[: len(code)].copy_(host, non_blocking=True)
        self.program = program
        self.device_program.words = program.words

    def __enter__(self) -> ProgramBuffer:
        self._token = _buffers.set((*_buffers.get(), self))
        _entered.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _buffers.reset(self._token)
        _entered.remove(self)
