"""Weights that stay packed from one inference pass to the next, for the CPU backend.

Its kernels read weights in panels (csrc/cpu/layer.h), for float32 products on AMX cut into three bfloat16 parts. Calls
pack them: weights of a training step or of a candidate change from call to call. In a model that answers one short
sequence after the other they do not, and packing takes as long as multiplying by some 100 tokens. So what calls
without gradients would pack for the second time is kept.

Against packing in every call, on two cores of an Intel Xeon with AMX (`python -m benchmarks.short`; H = 540, means over
d, float32 and bfloat16, one and two threads): 1.2 to 1.6 times as fast at 16 to 128 tokens, 1.07 to 1.33 at 256 to
1024. The same bits.

Kept are whole parameters (`torch.nn.Parameter` itself; views, subnets and products of factors are not), while

- the parameter lives, and is unchanged by its version, which all of PyTorch's in-place operations count, autograd's own
  means of noticing that a saved tensor was written to;
- its memory, strides and dtype are the same, and so are 32 of its elements: writes through `.data`, NumPy or another
  process are not counted as versions, but those change nearly every element;
- all that is kept stays below `FFNAS_PACKED_MIB` (1024 by default: 178 million float32 weights on AMX; 0 keeps none).

A write past PyTorch that changes few elements (`weight.data[3, 5] = 0.0`) can go unnoticed, as it does in autograd:
write under `torch.no_grad()` without `.data`, or set FFNAS_PACKED_MIB=0.

Rejected: a hash of every element: exact, but short calls do little else than read weights, and it reads all once more.
Packing when a module goes to eval mode, too: the op is called with parameters, not with modules.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.call import BackendUnavailable

ENVIRONMENT = "FFNAS_PACKED_MIB"
DEFAULT_MIB = 1024
MOST_TOKENS = 1024
"""With more, packing is a few percent of a call, and evaluations during a search would fill memory for it."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


class _Entry(NamedTuple):
    """What is known of a parameter; `packed` is None as long as it was met once."""

    parameter: weakref.ref[Tensor]
    state: tuple[Any, ...]
    packed: Tensor | None


class PackedWeights:
    """The packed weights of one loaded library.

    Args:
        library: csrc/cpu.
        limit: bytes to keep at most.

    Attributes:
        kept_bytes: of all packed weights.
    """

    def __init__(self, library: ctypes.CDLL, limit: int) -> None:
        self._library, self._limit = library, limit
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._lock = threading.RLock()  # a parameter may die, and its entry go, while another is stored
        self.kept_bytes = 0
        int64, pointer = ctypes.c_int64, ctypes.c_void_p
        for function, result, arguments in (
            (library.ffnas_isa_for, int64, [int64] * 2),
            (library.ffnas_packed_bytes, int64, [int64] * 4),
            (library.ffnas_pack, ctypes.c_int, [int64, pointer, *[int64] * 4, pointer]),
            (library.ffnas_samples, ctypes.c_uint64, [pointer, *[int64] * 4]),
        ):
            function.restype, function.argtypes = result, arguments

    def isa_for(self, isa: int, tokens: int) -> int:
        """The instruction set that a call of so many tokens runs on, where `isa` was asked for."""
        return self._library.ffnas_isa_for(isa, tokens)

    def find(self, weights: Sequence[Tensor], isa: int, tokens: int) -> list[Tensor | None]:
        """Weights packed, each None where the call packs it for itself.

        Args:
            weights: [outputs, inputs] each, of a call without gradients.
            isa: as `isa_for` gives it.
            tokens: rows of the call.

        Returns:
            uint8 tensors; to be held until the call has returned.
        """
        if not self._limit or tokens > MOST_TOKENS or not self._library.ffnas_packed_bytes(isa, tokens, 1, 1):
            return [None] * len(weights)
        return [self._find(weight, isa, tokens) for weight in weights]

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()
            self.kept_bytes = 0

    def _find(self, weight: Tensor, isa: int, tokens: int) -> Tensor | None:
        if type(weight) is not torch.nn.Parameter or weight.is_inference():
            return None
        key = (id(weight), isa)
        known = self._entries.get(key)
        state = self._state(weight)
        if known is not None and known.parameter() is weight and known.state == state:
            return known.packed if known.packed is not None else self._pack(key, known, tokens)
        self._store(key, _Entry(weakref.ref(weight, partial(self._forget, key)), state, None))
        return None

    def _state(self, weight: Tensor) -> tuple[Any, ...]:
        rows, columns = weight.shape
        address, stride, dtype = weight.data_ptr(), weight.stride(0), DTYPE_CODES[weight.dtype]
        samples = self._library.ffnas_samples(address, stride, dtype, rows, columns)
        return weight._version, samples, address, stride, dtype, rows, columns

    def _pack(self, key: tuple[int, int], known: _Entry, tokens: int) -> Tensor | None:
        *_, address, stride, dtype, rows, columns = known.state
        size = self._library.ffnas_packed_bytes(key[1], tokens, rows, columns)
        if self.kept_bytes + size > self._limit:
            return None
        packed = torch.empty(size, dtype=torch.uint8)
        if self._library.ffnas_pack(key[1], address, stride, dtype, rows, columns, packed.data_ptr()):
            raise RuntimeError("ffnas cpu backend: the weight does not fit this build of the library")
        self._store(key, known._replace(packed=packed))
        return packed

    def _store(self, key: tuple[int, int], entry: _Entry | None) -> None:
        with self._lock:
            before = self._entries.pop(key, None)
            if entry is not None:
                self._entries[key] = entry
            self.kept_bytes += _bytes(entry) - _bytes(before)

    def _forget(
        self, key: tuple[int, int], dead: weakref.ref[Tensor], *, ending: Callable[[], bool] = sys.is_finalizing
    ) -> None:
        if ending():  # the interpreter takes modules apart: what they named may be gone
            return
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.parameter is dead:
                self._store(key, None)


def _bytes(entry: _Entry | None) -> int:
    return 0 if entry is None or entry.packed is None else entry.packed.numel()


def limit_bytes() -> int:
    """Bytes that may be kept.

    Raises:
        BackendUnavailable: `FFNAS_PACKED_MIB` is not a number of at least 0.
    """
    text = os.environ.get(ENVIRONMENT, str(DEFAULT_MIB))
    try:
        mib = float(text)
    except ValueError:
        mib = -1.0
    if not 0 <= mib < float("inf"):
        raise BackendUnavailable(f"{ENVIRONMENT}={text!r} is not a number of MiB, 0 or more")
    return int(mib * 2**20)
