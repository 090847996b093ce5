"""The instruction sets of the CPU library (csrc/cpu), and which of them serves here. Imports no PyTorch."""

from __future__ import annotations

import ctypes
import os

from kernels.call import BackendUnavailable

ENVIRONMENT = "FFNAS_CPU_ISA"
"""Names the highest instruction set that may be used."""

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx", "amx_fp32")
"""In rising order; the position is the number the library knows."""

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

_FLOAT32 = ("generic", "avx2", "avx512", "amx_fp32")


def usable_isas(library: ctypes.CDLL) -> list[int]:
    """Instruction sets this build has, this machine runs and `FFNAS_CPU_ISA` allows; generic always.

    Raises:
        BackendUnavailable: `FFNAS_CPU_ISA` names no instruction set.
    """
    limit = os.environ.get(ENVIRONMENT, ISAS[-1])
    if limit not in ISAS:
        raise BackendUnavailable(f"{ENVIRONMENT}={limit!r} is none of {', '.join(ISAS)}")
    allowed = range(ISAS.index(limit) + 1)
    return [i for i in allowed if library.ffnas_built(i) and library.ffnas_runs(i)]


def best_isas(library: ctypes.CDLL) -> tuple[int, int]:
    """The instruction sets for float32 and for bfloat16 products; float32's also where there are none for bfloat16."""
    usable = usable_isas(library)
    return max(i for i in usable if ISAS[i] in _FLOAT32), max(i for i in usable if ISAS[i] != "amx_fp32")


def usable_int8(library: ctypes.CDLL) -> dict[str, int]:
    """Names and numbers of the sets for eight-bit integers that may be used here, in rising order; generic always.

    Raises:
        BackendUnavailable: `FFNAS_CPU_ISA` names no instruction set.
    """
    usable = usable_isas(library)
    return {n: i for n, (isa, i) in INT8.items() if ISAS.index(isa) in usable and library.ffnas_int8_runs(i)}
