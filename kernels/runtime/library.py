"""The C++ encoder (csrc/cpu/encoder.h) through ctypes, without PyTorch."""

from __future__ import annotations

import ctypes
from array import array
from functools import lru_cache
from typing import Any

import numpy as np

from kernels.backends.instruction_sets import ABI_VERSION, best_isas
from kernels.build import BuildError, library_path
from kernels.call import BackendUnavailable
from kernels.runtime.description import Arrays, Description, NativeError
from kernels.runtime.words import model_words

WANTED = ("head", "hidden", "pooled")
PRECISIONS = ("fp32", "bf16")

_ERRORS = {
    1: "out of memory",
    2: "a layer's program is not valid",
    3: "ids outside the vocabulary, token types or positions the model does not have, or a sequence without tokens",
}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(library_path()))
    except BuildError as error:
        raise NativeError(str(error)) from error
    library.ffnas_abi_version.restype = ctypes.c_int64
    if library.ffnas_abi_version() != ABI_VERSION:
        raise NativeError(
            f"the C++ library has interface {library.ffnas_abi_version()}, not {ABI_VERSION}: reinstall ffnas"
        )
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    library.ffnas_encoder_new.restype = pointer
    library.ffnas_encoder_new.argtypes = [pointer, whole, ctypes.c_double, whole, whole, pointer]
    library.ffnas_encoder_run.argtypes = [pointer] * 4 + [whole] * 3 + [ctypes.c_double, pointer]
    library.ffnas_encoder_free.argtypes = [pointer]
    library.ffnas_fingerprints.argtypes = [whole, pointer, whole, pointer]
    library.ffnas_encoder_free.restype = None
    return library


class Encoder:
    """A model in the library.

    Args:
        description, arrays: the model; arrays as `check_arrays` gives them. They are kept, not copied.
        threads: of its own, the caller's included.
        precision: of the matrix products; everything else is float32.
        watched: whether `unchanged` will be asked.

    Raises:
        NativeError: the library cannot be had, or refuses the model.
    """

    def __init__(
        self, description: Description, arrays: Arrays, threads: int, precision: str, *, watched: bool = False
    ) -> None:
        self.description = description
        self._arrays = arrays
        self._programs = [np.array(layer.program, np.int32) for layer in description.layers]
        self._handle = None
        self._library = _library()
        try:
            isas = best_isas(self._library)
        except BackendUnavailable as error:
            raise NativeError(str(error)) from error
        self._isa = isas[PRECISIONS.index(precision)]
        self._matrices = self._packed() if watched else array("q")
        self._sums = self._fingerprints()
        words = array("q", [ABI_VERSION, *model_words(description, self._matrix, self._program)])
        status = ctypes.c_int(0)
        address, count = words.buffer_info()
        self._handle = self._library.ffnas_encoder_new(
            address, count, description.eps, self._isa, threads, ctypes.addressof(status)
        )
        if not self._handle:
            raise NativeError(f"the model cannot be used: {_ERRORS.get(status.value, f'status {status.value}')}")

    def run(
        self, ids: Any, mask: Any, types: Any, wanted: str, padding: float
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One pass.

        Args:
            ids: int64 [B, S].
            mask: uint8 [B, S], not 0 at real tokens, or None.
            types: int64 [B, S], or None.
            wanted: `head`: scores [B, labels] or [B, S, labels]; `hidden`: the last layer's output [B, S, H], 0 at
                padding; `pooled`: [B, H].
            padding: what scores per token are at padding.

        Raises:
            NativeError: an id is outside the vocabulary, a sequence has no token or too many, or memory is out.
        """
        batch, length = ids.shape
        d = self.description
        last = len(d.labels) if wanted == "head" else d.hidden_size
        rows = wanted == "hidden" or (wanted == "head" and d.head == "tokens")
        out = np.empty((batch, length, last) if rows else (batch, last), np.float32)
        status = self._library.ffnas_encoder_run(
            self._handle, *(None if a is None else a.ctypes.data for a in (ids, mask, types)), batch, length,
            WANTED.index(wanted), padding, out.ctypes.data,
        )  # fmt: skip
        if status:
            raise NativeError(f"input: {_ERRORS.get(status, f'status {status}')}")
        return out

    def unchanged(self) -> bool:
        """Whether every byte of the matrices is what it was at first; reads all of them."""
        return self._fingerprints() == self._sums

    def _fingerprints(self) -> array[int]:
        count = len(self._matrices) // 4
        sums = array("Q", bytes(16 * count))
        if count:
            address = self._matrices.buffer_info()[0]
            self._library.ffnas_fingerprints(self._isa, address, count, sums.buffer_info()[0])
        return sums

    def _packed(self) -> array[int]:
        """Address, row stride, rows and row width in bytes of every matrix that is packed, as one row each."""
        words = array("q")
        for name, value in self._arrays.items():
            if value.ndim == 2 and name not in ("embeddings.token", "embeddings.position", "embeddings.type"):
                words.extend((value.ctypes.data, value.nbytes, 1, value.nbytes))
        return words

    def close(self) -> None:
        """Frees the packed weights and ends the threads; the object cannot be used afterwards."""
        handle, self._handle = self._handle, None
        if handle:
            self._library.ffnas_encoder_free(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()

    def _matrix(self, name: str) -> tuple[int, int]:
        found = self._arrays[name]
        return found.ctypes.data, found.shape[-1]

    def _program(self, index: int) -> tuple[int, int]:
        return self._programs[index].ctypes.data, self._programs[index].size
