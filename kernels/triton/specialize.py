"""The specialized tier: which calls run generated code, and the processes that compile it.

A call runs on the interpreting kernels until its program has run so often in one shape family that compiling repays
(`THRESHOLD` calls). Then a background process compiles what it needs into Triton's cache on disk, keyed there by
source, architecture, options and version; once it reports success, calls of that kind load the kernels from disk
(milliseconds) and run them. A compilation that fails is reported once, and the interpreting kernels go on serving.

    FFNAS_SPECIALIZE=0         never (the default, until a device was measured: docs/gpu.md)
    FFNAS_SPECIALIZE=1         as above
    FFNAS_SPECIALIZE=always    from the first call on, compiled in this process: for measurements and tests

Calls with a `ProgramBuffer` are never specialized: their program may change. While a CUDA graph is captured, generated
kernels are used only if they ran before.

Rejected: threads. Triton's compiler holds the interpreter lock for much of its time, and a crash of it would end
the training that it was meant to speed up.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Sequence

import torch

from kernels.bounded import Bounded
from kernels.call import FFNCall
from kernels.language.validation import checked_words
from kernels.triton import codegen
from kernels.triton.compile_pool import CompilePool
from kernels.triton.device_program import DeviceProgram, active_buffer, bound_buffer, device_program
from kernels.triton.evaluate import interpret
from kernels.triton.launch import interpreted
from kernels.triton.layout import allows_tf32
from kernels.triton.recipe import recipe

ENVIRONMENT = "FFNAS_SPECIALIZE"
THRESHOLD = 200
"""Calls of one kind before its program is compiled. Compiling takes about 10 s of a background process; a training step
that gains 0.1 ms repays that only after many more calls, a shorter trial never."""


class SpecializationWarning(UserWarning):
    """Generated code could not be compiled; the interpreting kernels serve instead."""


class _Kind:
    """A program in one shape family: how often it ran, and what became of its compilation."""

    def __init__(self) -> None:
        self.calls = 0
        self.requested = False
        self.ready = False
        self.used = False
        self.error: str | None = None
        self.reported = False


CACHE_SIZE = 4096
"""Programs (and kinds of calls of them) remembered at a time."""

_kinds: Bounded[tuple[object, ...], _Kind] = Bounded(CACHE_SIZE)
_generated: Bounded[tuple[torch.device, tuple[int, ...]], DeviceProgram] = Bounded(CACHE_SIZE)
_pool: CompilePool | None = None
_lock = threading.Lock()


def mode() -> str:
    """The value of FFNAS_SPECIALIZE. Raises ValueError for anything but "0", "1" or "always"."""
    value = os.environ.get(ENVIRONMENT, "0")
    if value not in ("0", "1", "always"):
        raise ValueError(f"{ENVIRONMENT} must be 0, 1 or always, got {value!r}")
    return value


def program_of(call: FFNCall, save: bool, needs: Sequence[bool] | None = None) -> DeviceProgram:
    """The program of a call on its device, interpreting or generated.

    Args:
        call: the call.
        save: whether forward saves.
        needs: of backward; None in forward.
    """
    words, device = checked_words(call.program), call.x.device
    buffer = bound_buffer(call.program, device) or active_buffer(words, device, backward=needs is not None)
    if buffer is not None:
        return buffer
    plain = device_program(words, device)
    how = mode()
    if how == "0" or device.type == "meta":
        return plain
    if how == "always":
        return _generated_program(plain)
    if interpreted(interpret):
        return plain
    kind = _kind(call, words, save, needs)
    if kind.ready:
        if kind.used or not torch.cuda.is_current_stream_capturing():
            kind.used = True
            return _generated_program(plain)
        return plain
    if kind.error is not None and not kind.reported:
        kind.reported = True
        warnings.warn(
            f"ffnas: {kind.error}; the interpreting kernels serve instead", SpecializationWarning, stacklevel=2
        )
    kind.calls += 1
    if kind.calls >= THRESHOLD and not kind.requested:
        kind.requested = True
        _request(kind, call, words, save, needs)
    return plain


def _kind(call: FFNCall, words: tuple[int, ...], save: bool, needs: Sequence[bool] | None) -> _Kind:
    x, w1, w2 = call.x, call.w1[0], call.w2[0]
    family = (
        x.shape[1], w1.shape[0], x.stride(0), w1.stride(0), w2.stride(0), x.dtype, w1.dtype, call.compute_dtype,
        call.layers, call.has_ln, call.p_drop > 0, save, None if needs is None else tuple(needs), x.device,
        allows_tf32(),
    )  # fmt: skip
    key = (words, *family)
    kind = _kinds.get(key)
    if kind is None:
        kind = _kinds[key] = _Kind()
    return kind


def _generated_program(plain: DeviceProgram) -> DeviceProgram:
    key = (plain.code.device, plain.words)
    known = _generated.get(key)
    if known is None:
        function = codegen.load(plain.words)
        known = _generated[key] = DeviceProgram(plain.words, plain.code, plain.slots, function)
    return known


def _request(kind: _Kind, call: FFNCall, words: tuple[int, ...], save: bool, needs: Sequence[bool] | None) -> None:
    """Asks the pool to compile; `kind` hears of the outcome from another thread."""
    made = recipe(call, save, needs)
    if made is None:
        return  # unaligned pointers: kernels would have to be compiled for each combination

    def finished(error: str | None) -> None:
        kind.error, kind.ready = error, error is None

    major, minor = torch.cuda.get_device_capability(call.x.device)
    pool().submit({"words": list(words), "recipe": made, "arch": 10 * major + minor}, finished)


def pool() -> CompilePool:
    """The pool of this process, started at the first request."""
    global _pool
    with _lock:
        if _pool is None:
            _pool = CompilePool()
        return _pool


def clear() -> None:
    """Forgets all counts and generated programs of this process (not what is on disk)."""
    _kinds.clear()
    _generated.clear()
