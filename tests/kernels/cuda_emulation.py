"""Builds the emulation of the CUDA kernels (csrc/cuda/emulation): once per source, into the cache of ffnas."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from kernels import generate_header
from kernels.build import (
    BuildError,
    build_once,
    compiler_key,
    find_compiler,
    run_compiler,
    shared_headers,
    source_folder,
)
from kernels.cache import cache_dir

FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE",
    "-Wno-unknown-pragmas", "-DFFNAS_EMULATION",
)  # fmt: skip


@lru_cache(maxsize=1)
def emulation_path() -> Path:
    """The emulated library; skips the test where there is no C++ compiler."""
    compiler, sources = find_compiler(), source_folder()
    if compiler is None or sources is None:
        pytest.skip("no C++ compiler, or no sources, to build the emulation of the CUDA kernels from")
    digest = hashlib.sha256(repr(FLAGS).encode())
    for file in [*shared_headers(sources), *sorted(f for f in (sources / "cuda").rglob("*") if f.is_file())]:
        digest.update(f"{file.name}\n".encode() + file.read_bytes())
    digest.update(generate_header.render().encode())
    key = f"emulation-{digest.hexdigest()[:24]}"
    target = cache_dir() / f"{key}-{compiler_key(compiler)}.so"
    if not target.exists():
        build_once(target, key, "emulation of the CUDA kernels", lambda: _build(compiler, sources, target))
    return target


def _build(compiler: str, sources: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
        made = Path(folder) / "emulation.so"
        flags = [*FLAGS, generate_header.write(Path(folder))]
        error = run_compiler([compiler, *flags, str(sources / "cuda/emulation/emulation.cpp"), "-o", str(made)])
        if error is not None:
            raise BuildError(error)
        os.replace(made, target)
