"""The units of work: one Triton kernel, or one source file, for one architecture; and their results on disk.

Which kernels there are is found first, by recording what every call launches. Launches that differ in nothing Triton
compiles for are one unit, whichever calls they come from. The costliest units come first, so that no process is left
with a long one at the end.

Rejected: one unit per call. Calls share half of their kernels, and two processes would compile those at the same time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from kernels import generate_header
from kernels.cache import cache_dir
from kernels.compile_check import machine_code, sources
from kernels.compile_check.call import Call
from kernels.compile_check.table import Row, too_much_shared

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Unit:
    """Launch number `launch` of a call, or a source file, compiled for sm_`arch`."""

    arch: int
    key: str
    call: Call | None = None
    launch: int = 0
    file: str = ""


def triton_units(calls: Sequence[Call], architectures: Sequence[int]) -> list[Unit]:
    """Every distinct kernel of the calls, for every architecture, costliest first."""
    distinct: dict[tuple[int, str], tuple[float, Call, int]] = {}
    for call in calls:
        for arch in architectures:
            for k, launch in enumerate(_launches(call, arch)):
                distinct.setdefault((arch, launch.key()), (_cost(launch), call, k))
    ordered = sorted(distinct.items(), key=lambda item: -item[1][0])
    return [Unit(arch, key, call, k) for (arch, key), (_, call, k) in ordered]


def file_units(files: Sequence[Path], architectures: Sequence[int]) -> list[Unit]:
    return [Unit(arch, file.name, file=str(file)) for file in files for arch in architectures]


def run_unit(unit: Unit) -> list[Row]:
    """Compiles a unit, or looks its rows up. Failures come back as rows with a problem."""
    stored = cache_dir() / "compile-check" / f"{_digest(unit)}.json"
    if stored.is_file():
        return [_loaded(row) for row in json.loads(stored.read_text(encoding="utf-8"))]
    try:
        rows = sources.compile_file(Path(unit.file), unit.arch) if unit.call is None else [_compile(unit)]
    except Exception as error:  # a compiler may fail in any way; the table says how
        text = str(error).strip() or repr(error)
        what = (unit.file and Path(unit.file).name) or unit.key.split(" ")[0].rpartition(":")[2]
        variant = "" if unit.call is None else unit.call.name
        return [Row(what, variant, unit.arch, problem=f"{type(error).__name__}: {text.splitlines()[0][:200]}")]
    if not any(row.problem for row in rows):
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        os.replace(temporary, stored)
    return rows


def _loaded(row: dict[str, Any]) -> Row:
    return Row(**{**row, "samples": {int(kind): word for kind, word in row["samples"].items()}})


@lru_cache(maxsize=4096)
def _launches(call: Call, arch: int) -> list[Any]:
    """What a call launches on sm_`arch`; found before processes are forked, and once per call elsewhere."""
    from kernels.triton.launch import recorded, target

    with target(arch):
        return recorded(call.run)


def _cost(launch: Any) -> float:
    """Rough relative time to compile: interpreting machines grow with their slots, backward has every derivative."""
    slots = {0: 1.0, 2: 4.0, 6: 6.0}.get(launch.constants.get("SLOTS", 0), 8.0)
    return slots * (2.0 if "bwd" in launch.kernel.__name__ else 1.0)


def build(unit: Unit) -> Any:
    """A Triton unit's compiled kernel, by way of Triton's cache on disk."""
    from kernels.triton.launch import target

    assert unit.call is not None
    with target(unit.arch):
        return _launches(unit.call, unit.arch)[unit.launch].build()


def _compile(unit: Unit) -> Row:
    assert unit.call is not None
    built, launch = build(unit), _launches(unit.call, unit.arch)[unit.launch]
    constants = {"warps": launch.warps, **launch.constants}
    return triton_row(launch.kernel.__name__, f"{unit.call.name} {_variant(constants)}", unit.arch, built)


def _variant(constants: dict[str, Any]) -> str:
    sizes = [
        constants.get(name, constants.get(other)) for name, other in (("BM", "ROWS"), ("BN", "FIRST"), ("BK", "SECOND"))
    ]
    blocks = "x".join(str(v) for v in sizes if v is not None)
    return f"{constants.get('SLOTS', 0)} slots {blocks} {constants['warps']} warps"


def triton_row(kernel: str, variant: str, arch: int, built: Any) -> Row:
    """The row of a compiled Triton kernel."""
    cubin = built.asm["cubin"]
    registers, spills = machine_code.registers(cubin)
    multiplies = wants_tensor_core(built.asm["ttir"])
    kinds = machine_code.samples(b"".join(code for _, code in machine_code.kernel_code(cubin))) if multiplies else {}
    problem = f"spills {spills} bytes" if spills else too_much_shared(arch, built.metadata.shared)
    return Row(
        kernel, variant, arch, registers, spills, built.metadata.shared, multiplies=multiplies, samples=kinds,
        problem=problem,
    )  # fmt: skip


def wants_tensor_core(ttir: str) -> bool:
    """Whether a kernel has a product of 16-bit operands, or of float32 ones that may be rounded to TF32."""
    products = re.findall(r"tt\.dot\b.*", ttir)
    return any(re.search(r"xb?f16", line.split(" -> ")[0]) or "= tf32" in line for line in products)


def _digest(unit: Unit) -> str:
    """Hash of a unit and of everything its result depends on."""
    return hashlib.sha256(f"{unit.arch} {unit.key} {_versions(unit.call is None)}".encode()).hexdigest()[:32]


@lru_cache
def _versions(cuda: bool) -> str:
    import torch
    import triton

    digest = hashlib.sha256(repr((torch.__version__, triton.__version__, sys.version)).encode())
    if cuda:
        files = [*sorted(sources.FOLDER.glob("*.*")), *sorted(sources.FOLDER.parent.glob("*.h"))]
        digest.update((generate_header.render() + sources.nvcc_version()).encode())
    else:
        language = (_PACKAGE / "language" / name for name in ("program.py", "operators.py"))
        files = [*sorted((_PACKAGE / "triton").glob("*.py")), *language]
    for file in (*files, *sorted(Path(__file__).parent.glob("*.py"))):
        digest.update(file.read_bytes())
    return digest.hexdigest()
