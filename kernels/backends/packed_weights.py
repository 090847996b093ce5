"""Weights that stay packed from one inference pass to the next, for the CPU backend.

Its kernels read weights in panels (csrc/cpu/layer.h), which every call packs. In a model that answers one short text
after the other the same weights would be packed again and again; a parameter that calls without gradients meet for the
second time is kept. Kept are whole `torch.nn.Parameter`s of 256 KiB and more, while their memory lives, and at most
`FFNAS_PACKED_MIB` in all (1024; 0 keeps none).

What is kept is used only where the parameter still has the very bytes that were packed: every call reads all of them
once for two sums (csrc/cpu/fingerprint.h), one of which differs for certain where one element does. So no write goes
unnoticed. What that costs and gains, and what was rejected: docs/decisions/0007.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import weakref
from array import array
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

LEAST_BYTES = 1 << 18
"""Of smaller weights, packing takes no longer than looking whether they changed."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}


Key = tuple[int, ...]
"""Address, instruction set, shape, elements between rows, dtype: a matrix in memory, whatever it holds."""


class _Entry(NamedTuple):
    """What is known of a parameter's memory; `packed` is None as long as its bytes were met once."""

    storage: weakref.ref[torch.UntypedStorage]
    sums: tuple[int, int]
    packed: Tensor | None


class PackedWeights:
    """The packed weights of one loaded library.

    Args:
        library: csrc/cpu.
        limit: bytes to keep at most.

    Attributes:
        kept_bytes: of all packed weights.
        least_bytes: smaller weights are packed in every call.
    """

    def __init__(self, library: ctypes.CDLL, limit: int) -> None:
        self._library, self._limit = library, limit
        self._entries: dict[Key, _Entry] = {}
        self._lock = threading.RLock()  # memory may die, and its entry go, while another is stored
        self.kept_bytes, self.least_bytes = 0, LEAST_BYTES
        int64, pointer = ctypes.c_int64, ctypes.c_void_p
        signatures: tuple[tuple[Any, Any, list[Any]], ...] = (
            (library.ffnas_isa_for, int64, [int64] * 2),
            (library.ffnas_packed_bytes, int64, [int64] * 4),
            (library.ffnas_pack, ctypes.c_int, [int64, pointer, *[int64] * 4, pointer]),
            (library.ffnas_fingerprints, ctypes.c_int, [int64, pointer, int64, pointer]),
        )
        for function, result, arguments in signatures:
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
        found: list[Tensor | None] = [None] * len(weights)
        if not self._limit or tokens > MOST_TOKENS or not self._library.ffnas_packed_bytes(isa, tokens, 1, 1):
            return found
        places: list[int] = []
        keys: list[Key] = []
        for k, weight in enumerate(weights):
            if type(weight) is torch.nn.Parameter and weight.nbytes >= self.least_bytes:
                places.append(k)
                keys.append((weight.data_ptr(), isa, *weight.shape, weight.stride(0), DTYPE_CODES[weight.dtype]))
        for k, key, now in zip(places, keys, self.sums(keys), strict=True):
            known = self._entries.get(key)
            if known is None or known.sums != now:
                storage = weakref.ref(weights[k].untyped_storage(), partial(self._forget, key))
                self._store(key, _Entry(storage, now, None))
            else:
                found[k] = known.packed if known.packed is not None else self._pack(key, known, tokens)
        return found

    def sums(self, keys: Sequence[Key]) -> list[tuple[int, int]]:
        """Per matrix two numbers, one of which at least differs where an element does."""
        if not keys:
            return []
        words = array("q")
        for address, _, rows, columns, stride, code in keys:
            size = 4 if code == DTYPE_CODES[torch.float32] else 2
            if stride == columns:
                words.extend((address, 0, 1, rows * columns * size))
            else:
                words.extend((address, stride * size, rows, columns * size))
        sums = array("Q", bytes(16 * len(keys)))
        self._library.ffnas_fingerprints(keys[0][1], words.buffer_info()[0], len(keys), sums.buffer_info()[0])
        return list(zip(sums[::2], sums[1::2], strict=True))

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()
            self.kept_bytes = 0

    def _pack(self, key: Key, known: _Entry, tokens: int) -> Tensor | None:
        address, isa, rows, columns, stride, code = key
        size = self._library.ffnas_packed_bytes(isa, tokens, rows, columns)
        if self.kept_bytes + size > self._limit:
            return None
        packed = torch.empty(size, dtype=torch.uint8)
        if self._library.ffnas_pack(isa, address, stride, code, rows, columns, packed.data_ptr()):
            raise RuntimeError("ffnas cpu backend: the weight does not fit this build of the library")
        self._store(key, known._replace(packed=packed))
        return packed

    def _store(self, key: Key, entry: _Entry | None) -> None:
        with self._lock:
            before = self._entries.pop(key, None)
            if entry is not None:
                self._entries[key] = entry
            self.kept_bytes += _size(entry) - _size(before)

    def _forget(
        self,
        key: Key,
        dead: weakref.ref[torch.UntypedStorage],
        *,
        ending: Callable[[], bool] = sys.is_finalizing,
    ) -> None:
        if ending():  # the interpreter takes modules apart: what they named may be gone
            return
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.storage is dead:
                self._store(key, None)


def _size(entry: _Entry | None) -> int:
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
