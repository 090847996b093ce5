"""`make gpu-check`: everything a machine with an NVIDIA GPU should confirm, in one command of at most eight minutes.

    1. build      the CUDA C++ kernels (from the cache, if they are there)
    2. test       the tests marked `gpu`, in several processes where pytest-xdist is installed: they mostly compile
    3. measure    `python -m benchmarks.gpu`, whose JSON and Markdown go to benchmarks/results/
    4. sanitize   a short set of tests under compute-sanitizer (memcheck, racecheck), where that is installed

A step has a limit, and no more than what the eight minutes leave it: `BUDGET` seconds in all, of which later steps
keep their `reserve`. A step that fails, or is cut short, does not keep the next from running; the exit code is 1 then.
Without a GPU, `--dry-run` runs what needs none: the build where there is nvcc, collection of the tests, and the
benchmark's own code on a CPU, with a result that is marked a stub and goes to a temporary folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kernels.build import find_compiler
from kernels.cuda.build import find_nvcc

BUDGET = 480
PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
SHORT = ["-n", "0", "-k", "one_token or empty_batch or of_nothing_and or (test_on_a_gpu and serial and bf16)"]
BUILD = "from kernels.cuda.build import library_path; print(library_path())"
REHEARSAL = ["--rehearse", "--quick", "--tokens", "6", "--dtypes", "fp32", "--budget", "40"]


@dataclass(frozen=True)
class Step:
    """A command; seconds it may take, and seconds it leaves for the steps after it."""

    name: str
    command: Sequence[str]
    limit: float
    reserve: float = 0
    environment: Mapping[str, str] = field(default_factory=dict)


def run(step: Step, left: float) -> bool:
    """Runs a step with its output shown; True if it succeeded in time. `left`: seconds of the whole budget."""
    limit = min(step.limit, left - step.reserve)
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    if limit <= 0:
        print(f"== {step.name}: left out, the time is up", flush=True)
        return False
    start = time.monotonic()
    process = subprocess.Popen(step.command, env={**os.environ, **step.environment}, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers it has started
        process.wait()
        print(f"== {step.name}: took more than {limit:.0f} s", flush=True)
        return False
    verdict = "ok" if code == 0 else f"exit code {code}"
    print(f"== {step.name}: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def steps(quick: bool) -> list[Step]:
    """The steps on a machine with a GPU."""
    parallel = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("xdist") is None:
        parallel = []
    measure = [sys.executable, "-m", "benchmarks.gpu", *(["--quick", "--budget", "150"] if quick else [])]
    found = [
        Step("build", [sys.executable, "-c", BUILD], 150, 270),
        Step("test", [*PYTEST, *parallel], 150 if quick else 3600, 230 if quick else 0),
        Step("measure", measure, 220 if quick else 7200, 40 if quick else 0),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("== sanitize: left out, compute-sanitizer is not installed")
        return found
    options = SHORT if parallel else SHORT[2:]
    for tool, reserve in (("memcheck", 20), ("racecheck", 0)):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, *options]
        # PyTorch's allocator would hide an access past the end of a tensor in a larger block of its own
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        found.append(Step(f"sanitize ({tool})", command, 120, reserve, uncached))
    return found


def dry_steps(folder: Path) -> list[Step]:
    """The steps without a GPU; the report of a made-up device goes to `folder`."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    rehearse = [sys.executable, "-m", "benchmarks.gpu", *REHEARSAL, "--out", str(folder)]
    found = [
        Step("collect", [*PYTEST, "--collect-only"], 240),
        Step("measure (rehearsal)", rehearse, 300, 0, environment),
    ]
    if find_nvcc() is None or find_compiler() is None:
        print("== build: left out, nvcc is not installed")
        return found
    return [Step("build", [sys.executable, "-c", BUILD], 300), *found]


def check(todo: Sequence[Step], budget: float) -> bool:
    """Runs the steps; True if all succeeded."""
    start = time.monotonic()
    results = [run(step, budget - (time.monotonic() - start)) for step in todo]
    print(f"== all: {sum(results)} of {len(results)} steps ok, {time.monotonic() - start:.0f} s", flush=True)
    return all(results)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: build, collect tests, rehearse the rest")
    parser.add_argument("--full", action="store_true", help="all expressions and the autotuned torch.compile: longer")
    args = parser.parse_args()
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            done = check(dry_steps(Path(folder)), float("inf"))
            for report in Path(folder).glob("*.md"):
                print(report.read_text())
        return 0 if done else 1
    if not torch.cuda.is_available():
        print(
            f"gpu-check: PyTorch {torch.__version__} finds no CUDA device: run it on a machine with an NVIDIA GPU and a"
            " CUDA build of PyTorch, or add ARGS=--dry-run",
            file=sys.stderr,
        )
        return 2
    return 0 if check(steps(not args.full), float("inf") if args.full else BUDGET) else 1


if __name__ == "__main__":
    sys.exit(main())
