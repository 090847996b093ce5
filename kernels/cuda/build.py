"""Builds the CUDA kernels (csrc/cuda) with nvcc: by setup.py at installation, otherwise once, at first use, into a
cache.

    kernels/_ffnas_cuda.so          built at installation; used if its sources are those at hand
    <cache>/ffnas-cuda-<sources>-<nvcc>.so

One library holds machine code for sm_80 and sm_90a, and PTX of compute_80 that the driver compiles for anything else.
It speaks plain C and links the CUDA runtime statically: one build serves every PyTorch, whichever CUDA that was built
with, so neither is part of the key. `FFNAS_NVCCFLAGS` adds flags and is. Whether to build is decided by nvcc being
there, never by a device: machines that build have none.

Rejected: PyTorch's stable ABI (torch/csrc/stable). It saves some microseconds of argument packing a call, but a file
takes 12 s longer to compile, against headers that differ between the PyTorch versions served.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kernels import generate_header
from kernels.build import (
    PACKAGE,
    BuildError,
    build_once,
    compiler_key,
    run_compiler,
    shared_headers,
    source_folder,
)
from kernels.cache import cache_dir

LIBRARY_NAME = "_ffnas_cuda.so"
"""Name of the library built at installation, in the package's folder."""
ARCHITECTURES = ("80", "90a")
FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v")


def library_path() -> Path:
    """The compiled library for the sources at hand; builds it if nobody has.

    Raises:
        BuildError: there is none and it cannot be built.
    """
    installed = PACKAGE / LIBRARY_NAME
    sources = source_folder()
    if sources is None:
        if installed.exists():
            return installed
        raise BuildError("the CUDA sources are not part of this installation: reinstall ffnas")
    key = source_key(sources)
    if installed.exists() and key.encode() in installed.read_bytes():
        return installed
    nvcc = find_nvcc()
    if nvcc is None:
        built = sorted(cache_dir().glob(f"{key}-*.so"))
        if built:
            return built[-1]
        raise BuildError("no CUDA compiler found (CUDA_HOME, PATH, /usr/local/cuda): install the CUDA toolkit")
    target = cache_dir() / f"{key}-{compiler_key(nvcc)}.so"
    if not target.exists():
        build_once(target, key, f"CUDA kernels with {nvcc}", lambda: build_library(target, sources, nvcc))
    return target


def find_nvcc() -> str | None:
    """nvcc of `$CUDA_HOME` or `$CUDA_PATH`, on the path, or where the toolkit installs itself."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in (*homes, None, "/usr/local/cuda"):
        found = shutil.which("nvcc") if folder is None else shutil.which("nvcc", path=str(Path(folder) / "bin"))
        if found:
            return found
    return None


def source_files(sources: Path) -> list[Path]:
    """The files nvcc compiles, of csrc at `sources`."""
    return sorted((sources / "cuda").glob("*.cu"))


def source_key(sources: Path) -> str:
    """Hash of everything that decides what the library does: sources and flags."""
    digest = hashlib.sha256()
    folder = sources / "cuda"
    for file in [*shared_headers(sources), *sorted(f for f in folder.iterdir() if f.is_file())]:
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update(generate_header.render().encode())
    digest.update(repr((ARCHITECTURES, FLAGS, _extra_flags())).encode())
    return "ffnas-cuda-" + digest.hexdigest()[:24]


def build_library(target: Path, sources: Path, nvcc: str) -> None:
    """Compiles `sources` (csrc) and links the library at `target`, which appears whole or not at all.

    Raises:
        BuildError: nvcc failed; the message has its first error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        work = Path(folder)
        flags = [
            *FLAGS,
            *_targets(),
            generate_header.write(work),
            f'-DFFNAS_CUDA_BUILD_KEY="{source_key(sources)}"',
            *_extra_flags(),
        ]
        files = source_files(sources)

        def compile_file(source: Path) -> str | None:
            command = [nvcc, *flags, "-c", str(source), "-o", str(work / f"{source.name}.o")]
            return run_compiler(command, log=work / f"{source.name}.log")

        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
            errors = [e for e in pool.map(compile_file, files) if e is not None]
        if errors:
            raise BuildError(errors[0])
        objects = [str(work / f"{f.name}.o") for f in files]
        link = [nvcc, "-shared", "-cudart", "static", "-o", str(work / "library.so"), *objects, *_extra_flags()]
        error = run_compiler(link)
        if error is not None:
            raise BuildError(error)
        with open(work / "library.so", "ab") as library:
            library.write(_LOG_MARK + b"".join((work / f"{f.name}.log").read_bytes() for f in files))
        os.replace(work / "library.so", target)


_LOG_MARK = b"\nffnas: messages of ptxas\n"


def ptxas_log(library: Path) -> str:
    """What ptxas said about every kernel of a library: `build_library` appends it to the file, past what is loaded."""
    return library.read_bytes().rpartition(_LOG_MARK)[2].decode()


class KernelReport(NamedTuple):
    """One kernel in machine code for one architecture; `name` is mangled, sizes are in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def kernel_reports(log: str) -> list[KernelReport]:
    """What ptxas said (`-Xptxas -v`) about every kernel, from `ptxas_log`."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        name, architecture = re.findall(r"'(\S+)'", part)[:2]
        (sizes,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        (registers,) = re.findall(r"Used (\d+) registers", part)
        found.append(KernelReport(name, architecture, int(registers), *map(int, sizes)))
    return found


def _targets() -> list[str]:
    machine = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return [*machine, f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"]


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("FFNAS_NVCCFLAGS", ""))
