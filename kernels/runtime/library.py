"""The C++ encoder (csrc/cpu/encoder.h) through ctypes, without PyTorch."""

from __future__ import annotations

import ctypes
import os
from array import array
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.backends.instruction_sets import ABI_VERSION, best_isas, usable_int8
from kernels.build import BuildError, library_path
from kernels.call import BackendUnavailable
from kernels.runtime.description import HEADS, PRECISIONS, Answers, Arrays, Description, NativeError, check_arrays
from kernels.runtime.words import model_words

WANTED = ("head", "hidden", "pooled")

_ERRORS = {
    1: "out of memory",
    2: "a layer's program is not valid",
    5: "encoder.bin or weights.safetensors is missing, cut, or was changed",
    3: "ids outside the vocabulary, token types or positions the model does not have, a sequence without tokens, or"
    " padding where the model reads the first token",
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
    library.ffnas_encoder_read.restype = pointer
    library.ffnas_encoder_read.argtypes = [ctypes.c_char_p, whole, whole, pointer]
    library.ffnas_encoder_size.restype = whole
    library.ffnas_encoder_size.argtypes = [pointer, ctypes.c_int]
    library.ffnas_encoder_run_on.argtypes = [pointer, whole, *[pointer] * 3, *[whole] * 3, ctypes.c_double, pointer]
    library.ffnas_encoder_free.argtypes = [pointer]
    library.ffnas_fingerprints.argtypes = [whole, pointer, whole, pointer]
    library.ffnas_int8_runs.argtypes = [whole]
    library.ffnas_int8_sums.argtypes = [whole, pointer, whole, whole, pointer, whole, *[pointer] * 4]
    library.ffnas_encoder_free.restype = None
    return library


class Encoder:
    """A model in the library; `from_arrays` and `from_folder` make one.

    Attributes:
        answers: what the model answers.
    """

    def __init__(self, library: ctypes.CDLL, handle: int, answers: Answers, precision: str, kept: Any = None) -> None:
        self._library, self._handle, self.answers, self._kept = library, handle, answers, kept
        self._isas = _isas(library)
        self._isa = self._isas[precision]
        self._matrices, self._sums = array("q"), array("Q")

    @classmethod
    def from_folder(cls, folder: Path, answers: Answers, threads: int, precision: str) -> Encoder:
        """Of a native folder, which C++ reads.

        Raises:
            NativeError: the library cannot be had, or the folder's files are not what they should be.
        """
        library, status = _library(), ctypes.c_int(0)
        isa = _isas(library)[precision]
        handle = library.ffnas_encoder_read(os.fsencode(folder), isa, threads, ctypes.addressof(status))
        if not handle:
            raise NativeError(f"{folder}: {_ERRORS.get(status.value, status.value)}; export the model again")
        made = cls(library, handle, answers, precision)
        sizes = [library.ffnas_encoder_size(handle, which) for which in range(5)]
        head = HEADS.index(answers.head)
        if sizes != [len(answers.labels), int(head == 2), answers.hidden_size, answers.positions, int(answers.pools)]:
            raise NativeError(f"{folder}: its files describe different models; export the model again")
        if bool(head) != bool(answers.labels):
            raise NativeError(f"{folder}: head {answers.head!r} with {len(answers.labels)} labels; export again")
        return made

    @classmethod
    def from_arrays(
        cls, description: Description, arrays: Arrays, threads: int, precision: str, *, watched: bool = False
    ) -> Encoder:
        """Of arrays in memory, contiguous ones of which are kept, not copied.

        Args:
            description, arrays: the model.
            threads: of its own, the caller's included.
            precision: of the matrix products; everything else is float32.
            watched: whether `unchanged` will be asked.

        Raises:
            NativeError: an array is missing or has another shape, or the library cannot be had, or refuses the model.
        """
        arrays = dict(check_arrays(description, arrays))
        library, status = _library(), ctypes.c_int(0)
        isa = _isas(library)[precision]
        programs = [np.array(layer.program, np.int32) for layer in description.layers]
        matrices = _packed(arrays) if watched else array("q")
        sums = _fingerprints(library, _isas(library)[PRECISIONS[0]], matrices)
        words = model_words(
            description,
            lambda name: (arrays[name].ctypes.data, arrays[name].shape[-1]),
            lambda index: (programs[index].ctypes.data, programs[index].size),
        )
        address, count = (given := array("q", [ABI_VERSION, *words])).buffer_info()
        handle = library.ffnas_encoder_new(address, count, description.eps, isa, threads, ctypes.addressof(status))
        del given
        if not handle:
            raise NativeError(f"the model cannot be used: {_ERRORS.get(status.value, status.value)}")
        made = cls(library, handle, description.answers, precision, arrays)
        made._matrices, made._sums = matrices, sums
        return made

    def run(
        self, ids: Any, mask: Any, types: Any, wanted: str, padding: float, precision: str | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One pass.

        Args:
            ids: int64 [B, S].
            mask: uint8 [B, S], not 0 at real tokens, or None.
            types: int64 [B, S], or None.
            wanted: `head`: scores [B, labels] or [B, S, labels]; `hidden`: the last layer's output [B, S, H], 0 at
                padding; `pooled`: [B, H].
            padding: what scores per token are at padding.
            precision: of the matrix products, where it is another than the model was made with.

        Raises:
            NativeError: an id is outside the vocabulary, a sequence has no token or too many, or memory is out.
        """
        if not self._handle:
            raise NativeError("the session is closed: make another one")
        batch, length = ids.shape
        d = self.answers
        last = len(d.labels) if wanted == "head" else d.hidden_size
        rows = wanted == "hidden" or (wanted == "head" and d.head == "tokens")
        out = np.empty((batch, length, last) if rows else (batch, last), np.float32)
        isa = self._isa if precision is None else self._isas[precision]
        given = (None if a is None else a.ctypes.data for a in (ids, mask, types))
        what = WANTED.index(wanted)
        status = self._library.ffnas_encoder_run_on(
            self._handle, isa, *given, batch, length, what, padding, out.ctypes.data
        )
        if status:
            raise NativeError(f"input: {_ERRORS.get(status, f'status {status}')}")
        return out

    def unchanged(self) -> bool:
        """Whether every byte of the matrices is what it was at first; reads all of them."""
        return _fingerprints(self._library, self._isas[PRECISIONS[0]], self._matrices) == self._sums

    def close(self) -> None:
        """Frees the packed weights and ends the threads; the object cannot be used afterwards."""
        handle, self._handle = self._handle, 0
        if handle:
            self._library.ffnas_encoder_free(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self.close()


class CodeSums(NamedTuple):
    """codes [rows, depth], scale and zero [rows] of rows, and sums [rows, outputs] of products of their codes."""

    codes: np.ndarray[Any, np.dtype[np.int32]]
    scale: np.ndarray[Any, np.dtype[np.float32]]
    zero: np.ndarray[Any, np.dtype[np.int32]]
    sums: np.ndarray[Any, np.dtype[np.int32]]


def runs_int8(number: int) -> bool:
    """Whether this build and this machine have a set of kernels for eight-bit integers (`INT8`)."""
    return bool(_library().ffnas_int8_runs(number))


def code_sums(number: int, x: Any, w: Any) -> CodeSums:
    """What the set `number` makes of float32 x [rows, depth] and w [outputs, depth]; csrc/cpu/int8.h has the formula.

    Raises:
        NativeError: the set is not in this build, or the sizes are none it takes.
    """
    (rows, depth), outputs = x.shape, w.shape[0]
    shapes = ((rows, depth), np.int32), (rows, np.float32), (rows, np.int32), ((rows, outputs), np.int32)
    found = [np.zeros(shape, dtype) for shape, dtype in shapes]
    out = (a.ctypes.data for a in found)
    status = _library().ffnas_int8_sums(number, x.ctypes.data, rows, depth, w.ctypes.data, outputs, *out)
    if status:
        raise NativeError(f"int8: {_ERRORS.get(status, status)}")
    return CodeSums(*found)


def _isas(library: ctypes.CDLL) -> dict[str, int]:
    """Instruction sets by precision."""
    try:
        return dict(zip(PRECISIONS, (*best_isas(library), max(usable_int8(library).values())), strict=True))
    except BackendUnavailable as error:
        raise NativeError(str(error)) from error


def _packed(arrays: Arrays) -> array[int]:
    """Address, row stride, rows and row width in bytes of every matrix that is packed, as one row each."""
    words = array("q")
    for name, value in arrays.items():
        if value.ndim == 2 and name not in ("embeddings.token", "embeddings.position", "embeddings.type"):
            words.extend((value.ctypes.data, value.nbytes, 1, value.nbytes))
    return words


def _fingerprints(library: ctypes.CDLL, isa: int, matrices: array[int]) -> array[int]:
    count = len(matrices) // 4
    sums = array("Q", bytes(16 * count))
    if count:
        library.ffnas_fingerprints(isa, matrices.buffer_info()[0], count, sums.buffer_info()[0])
    return sums
