"""CUDA C++ files compiled with nvcc, and what ptxas says of their kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kernels import generate_header
from kernels.compile_check.machine_code import architecture, kernel_code, samples
from kernels.compile_check.table import Row
from kernels.cuda import build

FOLDER = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


def files(quick: bool) -> list[Path]:
    """Every csrc/cuda/*.cu (one of them if `quick`), those that take longest first; nothing without sources."""
    found = sorted(FOLDER.glob("*.cu"))
    return found[:1] if quick else sorted(found, key=lambda f: ("grouped" not in f.name, f.name))


def nvcc_version() -> str:
    nvcc = build.find_nvcc()
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""


def compile_file(file: Path, arch: int) -> list[Row]:
    """One row per kernel. Raises `RuntimeError` with nvcc's first error."""
    nvcc = build.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found")
    flags = [*(f for f in build.FLAGS if "ptxas" not in f), '-DFFNAS_CUDA_BUILD_KEY="compile-check"']
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        target = f"-arch=sm_{architecture(arch)}"
        command = [
            nvcc,
            *flags,
            generate_header.write(Path(folder)),
            "-cubin",
            target,
            "-Xptxas",
            "-v",
            str(file),
            "-o",
            str(cubin),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
            raise RuntimeError(errors[0] if errors else f"nvcc ended with {result.returncode}")
        code = dict(kernel_code(cubin.read_bytes()))
    return list(ptxas_rows(file.name, arch, result.stderr, code))


def ptxas_rows(name: str, arch: int, log: str, code: dict[str, bytes]) -> Iterator[Row]:
    """One row per kernel from the messages of ptxas -v, and the kernels' instructions by mangled name.

    Products of 16-bit elements must have a tensor-core instruction: their kernels are templates over the element.
    """
    blocks = re.split(r"Compiling entry function '(\S+)' for", log)[1:]
    for mangled, text in zip(blocks[::2], blocks[1::2], strict=True):
        used = re.search(r"Used (\d+) registers", text)
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        shared = re.search(r"(\d+) bytes smem", text)
        spills = int(spill[1]) + int(spill[2]) if spill else 0
        kernel = _demangled(mangled)
        yield Row(
            kernel, name, arch, int(used[1]) if used else 0, spills, int(shared[1]) if shared else 0,
            problem=f"spills {spills} bytes" if spills else "",
            multiplies=bool(re.search(r"<[^>]*(BFloat16|Half)", kernel)), samples=samples(code.get(mangled, b"")),
        )  # fmt: skip


def _demangled(name: str) -> str:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=False).stdout.strip()
    return text.split("(")[0].removeprefix("void ")
