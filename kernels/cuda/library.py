"""The compiled CUDA kernels through ctypes: argument records (mirrors of csrc/cuda), and which library serves a device.

CUDA tensors are served by the library nvcc built, found or built at the first call. CPU tensors are served only inside
`emulated(path)`, by the emulation that a C++ compiler made of the same sources: that is how tests run the kernels on
machines without a GPU.

Chosen: records passed by pointer and copied by the launch into kernel arguments, so that nothing is sent to the device
ahead of a launch and a captured graph holds all it needs. Rejected: argument tables in device memory, which need a copy
and a lifetime.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.build import BuildError
from kernels.call import BackendUnavailable, FFNCall
from kernels.reference.philox import drop_threshold

ABI_VERSION = 1
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HEAD_WORDS, MEMBER_WORDS, LAYER_WORDS = 9, 24, 22
"""Lengths of the parts of a grouped call's record, csrc/cuda/group.h."""
ROW_SUMS = 4
"""Column sums of the row kernel's backward: gamma, beta, dy, dy2."""


class View(ctypes.Structure):
    """A matrix: address (None: absent), row stride in elements, dtype code."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int64))


class Dropout(ctypes.Structure):
    _fields_ = (
        ("seed", ctypes.c_void_p),
        ("threshold", ctypes.c_uint64),
        ("scale", ctypes.c_float),
        ("stream", ctypes.c_uint32),
    )


class Rows(ctypes.Structure):
    _fields_ = (
        *((name, View) for name in ("x", "y", "y2", "ln_weight", "ln_bias", "out", "grad", "dy", "dy2", "dx")),
        ("stats", ctypes.c_void_p),
        ("dropout", Dropout),
        ("hidden", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class RowCall(ctypes.Structure):
    _fields_ = (
        ("rows", Rows),
        ("sums", View * ROW_SUMS),
        ("program", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tokens", "slots", "blocks", "wide", "device")),
        ("stream", ctypes.c_void_p),
    )


class Device(NamedTuple):
    """What a launch is planned by: multiprocessors, shared memory of a block and of a multiprocessor in bytes."""

    multiprocessors: int
    block_shared: int
    multiprocessor_shared: int


EMULATED_DEVICE = Device(2, 227 * 1024, 228 * 1024)
"""The limits of an H100, and few multiprocessors, so that blocks take several rows."""

_emulation: ctypes.CDLL | None = None


def library(device: torch.device) -> ctypes.CDLL:
    """The library that serves tensors on `device`.

    Raises:
        BackendUnavailable: there is none; the message says what is missing.
    """
    if device.type == "cuda":
        return _compiled()
    if device.type == "cpu" and _emulation is not None:
        return _emulation
    raise BackendUnavailable(f"the CUDA kernels serve CUDA tensors, not tensors on {device}")


@contextmanager
def emulated(path: Path) -> Iterator[None]:
    """Serves CPU tensors with the emulation at `path` inside the block (the whole process; for tests)."""
    global _emulation
    previous, _emulation = _emulation, open_library(path)
    try:
        yield
    finally:
        _emulation = previous


@contextmanager
def thread_order(step: int) -> Iterator[None]:
    """Runs the emulated threads of a block upwards (+1) or downwards (-1): results must not change."""
    assert _emulation is not None
    _emulation.ffnas_emulation_order(step)
    try:
        yield
    finally:
        _emulation.ffnas_emulation_order(1)


def is_emulated() -> bool:
    """Whether CPU tensors are served by the emulation at this moment."""
    return _emulation is not None


@lru_cache(maxsize=1)
def _compiled() -> ctypes.CDLL:
    from kernels.cuda.build import library_path

    try:
        return open_library(library_path())
    except BuildError as error:
        raise BackendUnavailable(str(error)) from error


def open_library(path: Path) -> ctypes.CDLL:
    """Loads a library and checks that it speaks this module's interface. Raises `BackendUnavailable` otherwise."""
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path} cannot be loaded: {error}") from error
    opened.ffnas_cuda_abi.restype = ctypes.c_int64
    opened.ffnas_cuda_abi.argtypes = [ctypes.c_int64]
    words = {2: HEAD_WORDS, 3: MEMBER_WORDS, 4: LAYER_WORDS}
    sizes = {0: ABI_VERSION, 1: ctypes.sizeof(RowCall), **{which: 8 * count for which, count in words.items()}}
    for which, expected in sizes.items():
        found = opened.ffnas_cuda_abi(which)
        if found != expected:
            raise BackendUnavailable(f"{path} has interface {found} ({which}), expected {expected}: reinstall ffnas")
    opened.ffnas_rows_shared.argtypes = [ctypes.c_int64] * 4
    opened.ffnas_rows_shared.restype = ctypes.c_int64
    for function in (opened.ffnas_rows_forward, opened.ffnas_rows_backward):
        function.argtypes = [ctypes.c_void_p]
        function.restype = ctypes.c_int
    for function in (opened.ffnas_grouped_fwd_shared, opened.ffnas_grouped_bwd_shared):
        function.argtypes = [ctypes.c_int64] * 4
        function.restype = ctypes.c_int64
    for function in (opened.ffnas_grouped_forward, opened.ffnas_grouped_backward):
        function.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        function.restype = ctypes.c_int
    return opened


def device_of(device: torch.device) -> Device:
    """Limits of a CUDA device (cached by its index), or of the emulated one."""
    return EMULATED_DEVICE if device.type == "cpu" else _properties(device.index)


@lru_cache(maxsize=64)
def _properties(index: int) -> Device:
    p: Any = torch.cuda.get_device_properties(index)  # shared_memory_per_block_optin is not in PyTorch's stubs
    return Device(p.multi_processor_count, p.shared_memory_per_block_optin, p.shared_memory_per_multiprocessor)


def stream_of(device: torch.device) -> int | None:
    """Handle of PyTorch's current stream on the device."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None


def device_index(device: torch.device) -> int:
    return device.index if device.type == "cuda" else -1


def view(t: Tensor | None) -> View:
    """A matrix, or a vector as a matrix of one row."""
    return View() if t is None else View(t.data_ptr(), t.stride(0) if t.dim() > 1 else 0, DTYPE_CODES[t.dtype])


def dropout(call: FFNCall, layer: int) -> Dropout:
    if call.seed is None:
        return Dropout()
    scale = 0.0 if call.p_drop >= 1.0 else 1.0 / (1.0 - call.p_drop)
    return Dropout(call.seed.data_ptr(), drop_threshold(call.p_drop), scale, layer)


def check(status: int, what: str) -> None:
    """Raises `RuntimeError` unless a launch succeeded."""
    if status:
        raise RuntimeError(f"ffnas {what}: launch failed with CUDA error {status}")
