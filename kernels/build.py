"""Builds the CPU kernels (csrc/cpu): by setup.py at installation, otherwise once, at first use, into a cache.

    kernels/_ffnas_cpu.so                                   built at installation; used if its sources are those at hand
    $FFNAS_CACHE | $XDG_CACHE_HOME/ffnas | ~/.cache/ffnas   cpu-<key of sources and flags>-<key of the compiler>.so

The library speaks plain C (csrc/cpu/api.cpp): it needs neither PyTorch nor Python to build and outlives upgrades of
both, so its key has neither. Each instruction set is one source file with its own compiler flags; one the compiler
does not know is left out. Several processes at once: one builds under a file lock, the others wait for it; the
library appears whole (written aside, then renamed). `FFNAS_CXXFLAGS` adds flags (sanitizers, say) and is part of the
key.

Rejected: `torch.utils.cpp_extension`. It pulls in PyTorch's headers (minutes instead of seconds), takes one set of
flags for all files, and names its cache by the user's file names, not by their content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from kernels import generate_header
from kernels.cache import cache_dir

PACKAGE = Path(__file__).resolve().parent
LIBRARY_NAME = "_ffnas_cpu.so"
"""Name of the library built at installation, in the package's folder."""

_COMMON_FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
)  # fmt: skip
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX512_BF16 = (*_AVX512, "-mavx512bf16")
_COMPILERS = ("c++", "g++", "clang++")


class BuildError(RuntimeError):
    """The library cannot be built; the message is one line saying why and what to do."""


class Unit(NamedTuple):
    """One source file: its flags, and the macro that tells api.cpp it is there (None: always)."""

    source: str
    flags: tuple[str, ...] = ()
    macro: str | None = None


_UNITS = (
    Unit("kernels_generic.cpp"),
    Unit("kernels_i8_generic.cpp"),
    Unit("runtime.cpp"),
    Unit("pool.cpp"),
    Unit("cpuid.cpp"),
)
_X86_UNITS = (
    Unit("kernels_avx512.cpp", _AVX512, "FFNAS_WITH_AVX512"),
    Unit("kernels_amx.cpp", (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"), "FFNAS_WITH_AMX"),
    Unit("kernels_amx_fp32.cpp", (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"), "FFNAS_WITH_AMX"),
    Unit("kernels_avx512bf16.cpp", _AVX512_BF16, "FFNAS_WITH_AVX512BF16"),
    Unit("kernels_avx2.cpp", _AVX2, "FFNAS_WITH_AVX2"),
    Unit("kernels_i8_amx.cpp", (*_AVX512_BF16, "-mavx512vnni", "-mamx-tile", "-mamx-int8"), "FFNAS_WITH_AMX_INT8"),
    Unit("kernels_i8_avx512vnni.cpp", (*_AVX512, "-mavx512vnni"), "FFNAS_WITH_AVX512VNNI"),
    Unit("kernels_i8_avxvnni.cpp", (*_AVX2, "-mavxvnni"), "FFNAS_WITH_AVXVNNI"),
    Unit("kernels_i8_avx2.cpp", _AVX2, "FFNAS_WITH_AVX2"),
)
_ARM_UNITS = (Unit("kernels_neon.cpp", (), "FFNAS_WITH_NEON"),)


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
        raise BuildError("the C++ sources are not part of this installation: reinstall ffnas")
    key = source_key(sources)
    if installed.exists() and key.encode() in installed.read_bytes():
        return installed
    cache = cache_dir()
    compiler = find_compiler()
    if compiler is None:
        built = sorted(cache.glob(f"cpu-{key}-*.so"))
        if built:
            return built[-1]
        raise BuildError(
            f"no C++ compiler found (CXX, {', '.join(_COMPILERS)}), so the C++ kernels cannot be built: install g++"
        )
    target = cache / f"cpu-{key}-{compiler_key(compiler)}.so"
    if not target.exists():
        _build_into_cache(target, sources, compiler, key)
    return target


def source_folder() -> Path | None:
    """csrc of the source checkout, or the copy inside an installed wheel; None if there is neither."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "_csrc"):
        if (folder / "cpu" / "api.cpp").is_file():
            return folder
    return None


def source_key(sources: Path) -> str:
    """Hash of everything that decides what the library does: sources, flags, processor family."""
    digest = hashlib.sha256()
    for file in [*shared_headers(sources), *sorted((sources / "cpu").iterdir())]:
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update(generate_header.render().encode())
    digest.update(repr((_UNITS, _X86_UNITS, _ARM_UNITS, _COMMON_FLAGS, _extra_flags(), platform.machine())).encode())
    return "ffnas-" + digest.hexdigest()[:24]


def shared_headers(sources: Path) -> list[Path]:
    """What the C++ and the CUDA kernels have in common, of csrc at `sources`."""
    return sorted(sources.glob("*.h"))


def find_compiler() -> str | None:
    """`$CXX` or the first C++ compiler on the path."""
    own = os.environ.get("CXX")
    for name in (own,) if own else _COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    return None


def build_library(target: Path, sources: Path, compiler: str) -> None:
    """Compiles `sources` (csrc) and links the library at `target`, which appears whole or not at all.

    Raises:
        BuildError: the compiler failed; the message has its first error.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        work = Path(folder)
        generate_header.write(work)
        objects, macros = _compile_units(sources / "cpu", work, compiler)
        defines = [f'-DFFNAS_BUILD_KEY="{source_key(sources)}"', *(f"-D{m}" for m in macros)]
        api = _compile(compiler, sources / "cpu" / "api.cpp", work / "api.o", defines)
        if api is not None:
            raise BuildError(api)
        link = [
            compiler,
            "-shared",
            "-o",
            str(work / "library.so"),
            str(work / "api.o"),
            *objects,
            "-pthread",
            *_extra_flags(),
        ]
        error = run_compiler(link)
        if error is not None:
            raise BuildError(error)
        os.replace(work / "library.so", target)


def _compile_units(folder: Path, work: Path, compiler: str) -> tuple[list[str], list[str]]:
    """(object files, macros) of every unit this compiler can compile."""
    own = {"x86_64": _X86_UNITS, "amd64": _X86_UNITS, "aarch64": _ARM_UNITS, "arm64": _ARM_UNITS}
    units = [*own.get(target_machine(compiler), ()), *_UNITS]

    def compile_unit(unit: Unit) -> str | None:
        return _compile(compiler, folder / unit.source, work / f"{unit.source}.o", unit.flags)

    with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
        errors = list(pool.map(compile_unit, units))
    objects, macros = [], []
    for unit, error in zip(units, errors, strict=True):
        if error is None:
            objects.append(str(work / f"{unit.source}.o"))
            macros += [unit.macro] if unit.macro else []
        elif unit.macro is None or not _flags_unknown(compiler, unit.flags, work):
            raise BuildError(error)
    return objects, macros


def target_machine(compiler: str) -> str:
    """The processor family that `compiler` makes code for, in small letters; a cross-compiler's is another."""
    result = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=False)
    return (result.stdout.strip().split("-")[0] or platform.machine()).lower()


def _flags_unknown(compiler: str, flags: tuple[str, ...], work: Path) -> bool:
    """Whether the compiler rejects `flags` on an empty file."""
    empty = work / "empty.cpp"
    empty.write_text("")
    return run_compiler([compiler, *flags, "-c", str(empty), "-o", str(work / "empty.o")]) is not None


def _compile(compiler: str, source: Path, output: Path, flags: tuple[str, ...] | list[str]) -> str | None:
    """Compiles one file; `opcodes.h` lies beside the output."""
    own = [*_COMMON_FLAGS, f"-I{output.parent}", *flags, *_extra_flags()]
    return run_compiler([compiler, *own, "-c", str(source), "-o", str(output)])


def run_compiler(command: list[str], log: Path | None = None) -> str | None:
    """Runs a compiler: None, or one line with its first error. What it writes to stderr also goes to the file `log`."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"cannot run the compiler {command[0]}: {error}"
    if log is not None:
        log.write_text(result.stderr)
    if result.returncode == 0:
        return None
    lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()[:1]
    return f"the C++ kernels do not compile: {lines[0] if lines else f'exit code {result.returncode}'}"


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("FFNAS_CXXFLAGS", ""))


def compiler_key(compiler: str) -> str:
    """Hash of what the compiler says about its version."""
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return hashlib.sha256(result.stdout.encode()).hexdigest()[:12]


def _build_into_cache(target: Path, sources: Path, compiler: str, key: str) -> None:
    build_once(target, key, f"CPU kernels with {compiler}", lambda: build_library(target, sources, compiler))


def build_once(target: Path, key: str, what: str, build: Callable[[], None]) -> None:
    """Runs `build`, which makes `target` appear whole, unless it exists; one process builds, the others wait for it.

    Raises:
        BuildError: the cache cannot be written to, or `build` raised it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.parent / f".{key}.lock", "w")  # noqa: SIM115 - closed by _locked
    except OSError as error:
        raise BuildError(f"cannot write to the cache {target.parent} ({error.strerror}): set FFNAS_CACHE") from error
    with _locked(lock):
        if target.exists():
            return
        print(f"ffnas: building the {what} (once, about a minute) ...", file=sys.stderr, flush=True)
        start = time.monotonic()
        build()
        print(f"ffnas: {what} built in {time.monotonic() - start:.0f} s: {target}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(file: object) -> Iterator[None]:
    """Holds an exclusive lock on an open file, across processes; the system drops it if the process dies."""
    import fcntl  # not on Windows, where there is no build either

    with file:  # type: ignore[attr-defined]
        fcntl.flock(file, fcntl.LOCK_EX)  # type: ignore[arg-type]
        yield


if __name__ == "__main__":
    print(library_path())
