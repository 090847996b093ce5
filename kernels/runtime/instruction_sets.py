"""The instruction sets of the CPU library (csrc/cpu), and which of them may serve here. Imports no PyTorch."""

from __future__ import annotations

import ctypes
import os

ENVIRONMENT = "FFNAS_CPU_ISA"
"""Names the highest instruction set that may be used."""

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx", "amx_fp32", "neon")
"""In rising order on one family of processors; the position is the number the library knows."""

INT8 = {
    "generic": ("generic", 64),
    "avx2": ("avx2", 65),
    "avxvnni": ("avx2", 66),
    "avx512vnni": ("avx512", 67),
    "amx": ("amx", 68),
}
"""Sets of kernels for products of eight-bit integers, in rising order: the instruction set that has to be allowed, and
the number the library knows."""

ABI_VERSION = 8
"""Of the library's C interface; csrc/cpu/api.cpp has the same number."""


class UnknownInstructionSet(ValueError):
    """`FFNAS_CPU_ISA` names none."""


def highest_allowed() -> int:
    """Number of the highest instruction set that `FFNAS_CPU_ISA` allows.

    Raises:
        UnknownInstructionSet: it names none.
    """
    limit = os.environ.get(ENVIRONMENT, ISAS[-1])
    if limit not in ISAS:
        raise UnknownInstructionSet(f"{ENVIRONMENT}={limit!r} is none of {', '.join(ISAS)}")
    return ISAS.index(limit)


def usable_isas(library: ctypes.CDLL) -> list[int]:
    """Instruction sets this build has, this machine runs and `FFNAS_CPU_ISA` allows; generic always."""
    return [i for i in range(highest_allowed() + 1) if library.ffnas_built(i) and library.ffnas_runs(i)]


def best_isas(library: ctypes.CDLL) -> tuple[int, int]:
    """The instruction sets for float32 and for bfloat16 products; float32's also where there are none for bfloat16."""
    limit, best = highest_allowed(), library.ffnas_best_isa
    best.argtypes, best.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_int64
    return best(0, limit), best(1, limit)


def usable_int8(library: ctypes.CDLL) -> dict[str, int]:
    """Names and numbers of the sets for eight-bit integers that may be used here, in rising order; generic always."""
    usable = usable_isas(library)
    return {n: i for n, (isa, i) in INT8.items() if ISAS.index(isa) in usable and library.ffnas_int8_runs(i)}
