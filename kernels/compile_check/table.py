"""What the compile check found, as rows, a table and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from kernels.compile_check.machine_code import mnemonics, tensor_core


@dataclass(frozen=True)
class Row:
    """What one kernel needs on one architecture; `problem` is empty when all is well.

    Attributes:
        registers, spills, shared: registers of a thread, bytes spilled, bytes of shared memory of a block.
        tensor_core: the tensor-core instruction found, or "-".
        multiplies: whether there must be one.
        samples: instructions by kind, until `named` looked at them.
    """

    kernel: str
    variant: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: str = "-"
    problem: str = ""
    multiplies: bool = False
    samples: dict[int, str] = field(default_factory=dict, hash=False, compare=False, repr=False)


def named(rows: Sequence[Row]) -> list[Row]:
    """The rows with their tensor-core instructions, and a problem where one is missing."""
    known = {}
    for arch in {row.arch for row in rows}:
        together: dict[int, str] = {}
        for row in rows:
            if row.arch == arch:
                together.update(row.samples)
        known[arch] = mnemonics(together, arch)
    made = []
    for row in rows:
        core = tensor_core(row.samples, known[row.arch])
        missing = row.multiplies and core == "-" and not row.problem
        made.append(replace(row, tensor_core=core, problem="no tensor-core instruction" if missing else row.problem))
    return made


_SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a block can have, by architecture."""


def too_much_shared(arch: int, shared: int) -> str:
    """What is wrong with a block of `shared` bytes, which would fail at its launch; empty where nothing is."""
    most = _SHARED.get(arch, shared)
    return f"needs {shared} bytes of shared memory, sm_{arch} has {most}" if shared > most else ""


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [["kernel", "variant", "arch", "regs", "spills", "smem", "tensor core", ""]]
    for r in sorted(rows, key=lambda r: (r.kernel, r.variant, r.arch)):
        numbers = [f"sm_{r.arch}", r.registers, r.spills, r.shared, r.tensor_core]
        cells.append([r.kernel, r.variant, *map(str, numbers), r.problem and f"FAILED: {r.problem}"])
    return _aligned(cells)


def summary(rows: Sequence[Row]) -> str:
    """One line per kernel, tier and architecture: how many, the most registers, spills and shared memory of any."""
    cells = [["kernel", "variants", "arch", "kernels", "regs", "spills", "smem", "tensor core", ""]]
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for r in sorted(rows, key=lambda r: (r.kernel, r.variant, r.arch)):
        groups.setdefault((r.kernel.split("<")[0], r.variant.split(" ")[0], r.arch), []).append(r)
    for (kernel, tier, arch), members in groups.items():
        most = [max(getattr(r, name) for r in members) for name in ("registers", "spills", "shared")]
        cores = sorted({r.tensor_core for r in members if r.multiplies}) or ["-"]
        failed = sum(bool(r.problem) for r in members)
        line = [kernel, tier, f"sm_{arch}", len(members), *most, " ".join(cores), f"{failed} FAILED" if failed else ""]
        cells.append([str(c) for c in line])
    return _aligned(cells)


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [*(max(len(row[k]) for row in cells) for k in range(len(cells[0]) - 1)), 0]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
