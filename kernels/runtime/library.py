"""The C++ encoder (csrc/cpu/encoder.h) through ctypes, without PyTorch."""

from __future__ import annotations

import ctypes
import os
from array import array
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .description import HEAD_CODES, PRECISIONS, Answers, Arrays, Description, NativeError, check_arrays
from .instruction_sets import ABI_VERSION, UnknownInstructionSet, best_isas, usable_int8
from .unchanged import Unchanged
from .words import model_words

if TYPE_CHECKING:
    import numpy as np

WANTED = ("head", "hidden", "pooled", "mean", "cls", "max")
"""What a pass may give; the position is the number the library knows."""
UNIT = 16
"""Added to the last four: vectors of length 1."""
LIBRARY = "_ffnas_cpu.so"

_ERRORS = {
    1: "out of memory",
    2: "a layer's program is not valid",
    5: "encoder.bin or weights.safetensors is missing, cut, or was changed",
    3: "ids outside the vocabulary, token types or positions the model does not have, a sequence without tokens, or"
    " padding where the model reads the first token, or scores are asked for",
}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_library_file()))
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
    library.ffnas_encoder_run_on.argtypes = [
        pointer, whole, *[pointer] * 3, *[whole] * 3, ctypes.c_double, pointer, whole, pointer,
    ]  # fmt: skip
    library.ffnas_encoder_free.argtypes = [pointer]
    library.ffnas_fingerprints.argtypes = [whole, pointer, whole, pointer]
    library.ffnas_int8_runs.argtypes = [whole]
    library.ffnas_int8_sums.argtypes = [whole, pointer, whole, whole, pointer, whole, *[pointer] * 4]
    library.ffnas_encoder_free.restype = None
    library.ffnas_watch_new.restype = pointer
    library.ffnas_watch_new.argtypes = [pointer, whole]
    for call in (library.ffnas_watch_arm, library.ffnas_watch_clean, library.ffnas_watch_free):
        call.argtypes = [pointer]
    return library


def _library_file() -> Path:
    """The library: beside this file in a wheel of the runtime's own, else as ffnas has or builds it."""
    own = Path(__file__).with_name(LIBRARY)
    if own.is_file():
        return own
    from kernels.build import BuildError, library_path

    try:
        return library_path()
    except BuildError as error:
        raise NativeError(str(error)) from error


class Encoder:
    """A model in the library; `from_arrays` and `from_folder` make one.

    Attributes:
        answers: what the model answers.
        outputs: scores per sequence or token.
    """

    def __init__(self, library: ctypes.CDLL, handle: int, answers: Answers, precision: str, kept: Any = None) -> None:
        self._library, self._handle, self.answers, self._kept = library, handle, answers, kept
        self._isas = _isas(library)
        self._isa = self._isas[precision]
        self._checked: Unchanged | None = None
        self.outputs = int(library.ffnas_encoder_size(handle, 0))

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
        sizes = [library.ffnas_encoder_size(handle, which) for which in range(2, 6)]
        named = made.outputs if answers.head == "mask" else len(answers.labels)
        wanted = [answers.hidden_size, answers.positions, int(answers.pools), HEAD_CODES[answers.head]]
        if [made.outputs, *sizes] != [named, *wanted] or (answers.head == "choice" and named != 1):
            raise NativeError(f"{folder}: its files describe different models; export the model again")
        if answers.head == "mask" and answers.labels:
            raise NativeError(f"{folder}: head 'mask' with {len(answers.labels)} labels, it has words; export again")
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
        import numpy as np

        arrays = dict(check_arrays(description, arrays))
        library, status = _library(), ctypes.c_int(0)
        isa = _isas(library)[precision]
        programs = [np.array(layer.program, np.int32) for layer in description.layers]
        checked = Unchanged(library, _isas(library)[PRECISIONS[0]], _packed(arrays)) if watched else None
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
        made._checked = checked
        return made

    def run(
        self, ids: Any, mask: Any, types: Any, wanted: str, padding: float, precision: str | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One pass.

        Args:
            ids: int64 [B, S].
            mask: uint8 [B, S], not 0 at real tokens, or None.
            types: int64 [B, S], or None.
            wanted: `head`: scores [B, outputs] or [B, S, outputs]; `hidden`: the last layer's output [B, S, H], 0 at
                padding; `pooled`: [B, H]; `mean`, `cls`, `max`: [B, H], of the last layer's output.
            padding: what scores per token are at padding.
            precision: of the matrix products, where it is another than the model was made with.

        Raises:
            NativeError: an id is outside the vocabulary, a sequence has no token or too many, or memory is out.
        """
        import numpy as np

        batch, length = ids.shape
        width, rows = self.shape_of(wanted)
        out = np.empty((batch, length, width) if rows else (batch, width), np.float32)
        given = [None if a is None else a.ctypes.data for a in (ids, mask, types)]
        self.call(given, batch, length, WANTED.index(wanted), padding, (None, 0), out.ctypes.data, precision)
        return out

    def run_at(
        self, ids: Any, mask: Any, types: Any, places: Any, precision: str | None = None
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores per token [places, outputs] of some real tokens, counted through [B, S]; arguments as of `run`."""
        import numpy as np

        batch, length = ids.shape
        out = np.empty((len(places), self.outputs), np.float32)
        given = [None if a is None else a.ctypes.data for a in (ids, mask, types)]
        self.call(given, batch, length, 0, 0.0, (places.ctypes.data, len(places)), out.ctypes.data, precision)
        return out

    def shape_of(self, wanted: str) -> tuple[int, bool]:
        """Numbers in a row of the result, and whether there is one per token."""
        if wanted == "head":
            return self.outputs, HEAD_CODES[self.answers.head] in (2, 3)
        return self.answers.hidden_size, wanted == "hidden"

    def call(
        self, given: list[int | None], batch: int, length: int, what: int, padding: float,
        places: tuple[int | None, int], out: int, precision: str | None = None,
    ) -> None:  # fmt: skip
        """One pass on memory: addresses of ids, mask and types, of the result, and of places and how many there are.

        Raises:
            NativeError: as of `run`.
        """
        if not self._handle:
            raise NativeError("the session is closed: make another one")
        isa = self._isa if precision is None else self._isas[precision]
        run = self._library.ffnas_encoder_run_on
        status = run(self._handle, isa, *given, batch, length, what, padding, *places, out)
        if status:
            raise NativeError(f"input: {_ERRORS.get(status, f'status {status}')}")

    def unchanged(self, watch: bool = True) -> bool:
        """Whether every byte of the matrices is what it was at first (`Unchanged`)."""
        return self._checked is not None and self._checked(watch)

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
    import numpy as np

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
    except UnknownInstructionSet as error:
        raise NativeError(str(error)) from error


def _packed(arrays: Arrays) -> list[tuple[int, int]]:
    """Address and bytes of every matrix that is packed."""
    tables = ("embeddings.token", "embeddings.position", "embeddings.type")
    return [(a.ctypes.data, a.nbytes) for name, a in arrays.items() if a.ndim == 2 and name not in tables]
