"""`ffnas doctor`: what this machine has, what is off and why, and whether the kernels compute what they should.

The output is meant for a bug report: versions, devices and reasons, no names of users, hosts, folders of theirs, no
values of variables that could hold a secret. Every part is looked at by itself; one that fails says so in its line and
the others follow.

Rejected: asking the user to run a test suite. It is not installed with the package, and takes minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from search.console.environment import OLDEST, processor, unused_gpu

VARIABLES = ("FFNAS_BACKEND", "FFNAS_CPU_ISA", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "CXX")
"""Variables worth knowing; only these are shown, and of those that may hold a path whether they are set."""

NEWEST = {"torch": (2, 13), "triton": (3, 9)}
"""Highest versions tested."""

MIN_DISK, MIN_MEMORY = 2 << 30, 4 << 30
SELF_TEST_SECONDS = 10.0
_HOME = re.compile(r"(/home|/Users|/root)(/[^/\s:]+)?")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://\S+", re.IGNORECASE)

Lines = Iterator[tuple[str, str]]


def command(argv: list[str]) -> None:
    """Prints the findings; ends with exit code 1 where the self-test fails."""
    parser = argparse.ArgumentParser(prog="ffnas doctor", description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("--no-test", action="store_true", help="leave out the self-test of the kernels")
    arguments = parser.parse_args(argv)
    failed = False
    for title, section in SECTIONS.items():
        if title == "self-test" and arguments.no_test:
            continue
        print(f"{title}:")
        for name, text in _guarded(section):
            failed |= text.startswith("WRONG")
            print(f"  {name:<22} {public(text)}", flush=True)
    if failed:
        raise SystemExit(1)


def public(text: str) -> str:
    """One line of `text` without folders of a user and without URLs."""
    text = " ".join(text.split())
    home = os.path.expanduser("~")
    if len(home) > 1:
        text = text.replace(home, "~")
    return _URL.sub("<url>", _HOME.sub("~", text))


def _guarded(section: Callable[[], Lines]) -> Lines:
    try:
        yield from section()
    except Exception as error:  # a doctor that falls ill helps nobody: the finding is the error
        yield "failed", f"{type(error).__name__}: {error}"


def versions() -> Lines:
    """ffnas, Python, and what ffnas stands on; "untested" outside the tested range."""
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "python", platform.python_version()
    for name in ("ffnas", "torch", "triton", "transformers", "datasets", "numpy", "safetensors", "optuna"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed" + (": run `pip install -e .`" if name == "ffnas" else "")
            continue
        low, high = {"triton": (3, 6), **OLDEST}.get(name), NEWEST.get(name)
        number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if low is not None and number < low:
            version += f" (too old: {'.'.join(map(str, low))} or later is needed)"
        elif high is not None and number > high:
            version += f" (untested: newer than {'.'.join(map(str, high))})"
        yield name, version


def devices() -> Lines:
    """Processors and GPUs, and the case of a GPU that this PyTorch cannot use."""
    import torch

    yield "cpu", f"{processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads"
    if torch.version.cuda is None:
        yield "cuda", unused_gpu() or "this PyTorch is built without CUDA"
        return
    if not torch.cuda.is_available():
        yield "cuda", f"built for CUDA {torch.version.cuda}, no device usable: check the driver (`nvidia-smi`)"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        old = " (too old: sm_80 or later is needed)" if found.major < 8 else ""
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", f"{found.name}, sm_{found.major}{found.minor}, {memory}, CUDA {torch.version.cuda}{old}"


def backends() -> Lines:
    """Every backend of the FFN op: on, or the reason why not."""
    from kernels.dispatch import BACKENDS, load_backend

    for name in BACKENDS:
        found = load_backend(name)
        detail = "on"
        if isinstance(found, str):
            detail = f"off: {found}"
        elif name == "cpu":
            import torch

            from kernels.backends.cpu import CpuBackend

            assert isinstance(found, CpuBackend)

            detail = f"on (float32: {found.isa(torch.float32)}, bfloat16: {found.isa(torch.bfloat16)})"
        yield name, detail


def compilers() -> Lines:
    """C++ and CUDA compilers, as they call themselves, and the assembler Triton uses."""
    from kernels.build import find_compiler
    from kernels.cuda.build import find_nvcc

    cxx = find_compiler()
    yield "C++", "none found: install g++, or only plain PyTorch serves" if cxx is None else _first_line(cxx)
    nvcc = find_nvcc()
    yield "nvcc", "none (needed only to build the CUDA kernels)" if nvcc is None else _first_line(nvcc, last=True)
    yield from _assembler(None if nvcc is None else str(Path(nvcc).with_name("ptxas")))


PTXAS = "TRITON_PTXAS_PATH"


def _assembler(installed: str | None) -> Lines:
    """Triton's ptxas; and how to use the installed one where that is newer.

    Old ones have been reported to reuse the registers of a Hopper product too early
    (tests/kernels/test_exact_products.py looks for that on a device).
    """
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return
    chosen = os.environ.get(PTXAS)
    own = chosen or str(Path(spec.origin).parent / "backends/nvidia/bin/ptxas")
    used, other = _release(own), None if installed is None else _release(installed)
    text = "none found" if used is None else ".".join(map(str, used))
    text += f" ({PTXAS})" if chosen else ""
    if other is not None and (used is None or other > used):
        newer = ".".join(map(str, other))
        text += f"; {newer} is installed: on Hopper `export {PTXAS}={installed}` before kernels are compiled"
    yield "ptxas of triton", text


def _release(program: str) -> tuple[int, ...] | None:
    """The release number an assembler prints; None where it cannot be run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"release (\d+)\.(\d+)", done.stdout)
    return None if found is None else (int(found[1]), int(found[2]))


def resources() -> Lines:
    """Caches, free disk and memory."""
    from kernels.cache import cache_dir

    cache = cache_dir()
    files = [p for p in cache.rglob("*") if p.is_file()] if cache.is_dir() else []
    size = sum(p.stat().st_size for p in files)
    yield "cache", f"{len(files)} files, {size / 2**20:.0f} MiB" + ("" if _writable(cache) else ": NOT writable")
    for name, folder in (("disk of the cache", cache), ("disk here", Path.cwd())):
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        yield name, f"{free / 2**30:.1f} GiB free" + (": little, a run needs some GiB" if free < MIN_DISK else "")
    memory = _free_memory()
    if memory is not None:
        yield "memory", f"{memory / 2**30:.1f} GiB free" + (": little" if memory < MIN_MEMORY else "")


def names() -> Lines:
    """Packages that share a name with ours, and the settings that decide how ffnas runs."""
    try:
        other = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        other = None
    spec = importlib.util.find_spec("kernels")
    ours = (
        spec is not None and spec.origin is not None and (Path(spec.origin).parent / "language/expression.py").is_file()
    )
    if other is None:
        yield "package `kernels`", "ours" if ours else "WRONG: another package of that name is imported"
    else:
        problem = "" if ours else " and hides ours: uninstall it (`pip uninstall kernels`) or use its own environment"
        yield "package `kernels`", f"{'' if ours else 'WRONG: '}Hugging Face's {other} is installed too{problem}"
    for variable in VARIABLES:
        if variable in os.environ:
            value = "set" if variable == "CXX" else os.environ[variable][:20]
            yield variable, value if re.fullmatch(r"[\w,.-]*", value) else "set"


def self_test() -> Lines:
    """Forward and backward of every backend against the reference in float64, on random expressions, for seconds."""
    import torch

    from kernels.dispatch import BACKENDS, load_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in BACKENDS:
        if name == "reference":
            continue
        if isinstance(load_backend(name), str):
            yield name, "left out (off)"
            continue
        at = "cpu" if name == "cpu" else device
        began, checked, worst = time.monotonic(), 0, 0.0
        while time.monotonic() - began < SELF_TEST_SECONDS / 3 and checked < 60:
            worst = max(worst, _check(name, at, checked))
            checked += 1
        verdict = "agrees" if worst <= LARGEST_ERROR else "WRONG: disagrees"
        yield name, f"{verdict} with the reference: {checked} expressions, largest relative error {worst:.1e}"


LARGEST_ERROR = 1e-4
"""Of an output or gradient, relative to its norm: float32 sums differ by 1e-6 from float64, kinks by more."""

_EXPRESSIONS = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "linear(relu(mul(linear(x,wb1),x)),wb2)",
    "add(x,linear(elu(linear(sigmoid(x),wb1)),wb2))",
    "max(linear(tanh(x),wb1),linear(swish(x),wb2))",
    "leaky_relu(linear(gelu(linear(max(x,tanh(x)),wb1)),wb2))",
)


def _check(backend: str, device: str, number: int) -> float:
    """Largest relative error of output and gradients of one case."""
    import torch

    from kernels import fused_ffn, use_backend

    expression = _EXPRESSIONS[number % len(_EXPRESSIONS)]
    generator = torch.Generator().manual_seed(number)
    hidden = (32, 45, 64)[number % 3]
    inner = hidden if expression.startswith("max(linear") else hidden // 2
    shapes = [(7, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,)]
    values = [torch.randn(*s, generator=generator, dtype=torch.float64) / s[-1] ** 0.5 for s in shapes]

    def run(name: str, dtype: torch.dtype, at: str) -> list[torch.Tensor]:
        tensors = [v.to(at, dtype).requires_grad_() for v in values]
        with use_backend(name):
            out = fused_ffn(*tensors, expression)
            gradients = torch.autograd.grad(out.square().sum(), tensors)
        return [t.detach().double().cpu() for t in (out, *gradients)]

    pairs = zip(run(backend, torch.float32, device), run("reference", torch.float64, "cpu"), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-9)) for a, b in pairs)


SECTIONS: dict[str, Callable[[], Lines]] = {
    "versions": versions,
    "devices": devices,
    "backends": backends,
    "compilers": compilers,
    "resources": resources,
    "names and settings": names,
    "self-test": self_test,
}


def _free_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _first_line(program: str, *, last: bool = False) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=20)
    lines = done.stdout.strip().splitlines() or ["says nothing"]
    return lines[-1 if last else 0]


def _writable(folder: Path) -> bool:
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return os.access(existing, os.W_OK)


if __name__ == "__main__":
    from search.cli import guarded

    sys.exit(guarded(command, sys.argv[1:]))
