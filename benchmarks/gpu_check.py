"""`make gpu-check`: everything a machine with an NVIDIA GPU should confirm, in one command of at most eight minutes.

    1. build      the CUDA C++ kernels (from the cache, if they are there)
    2. test       the tests marked `gpu`
    3. sanitize   a short set of them under compute-sanitizer (memcheck, racecheck), where that is installed
    4. measure    `python -m benchmarks.gpu`, whose JSON and Markdown go to benchmarks/results/

Steps have time limits; a step that fails does not keep the next from running, and the exit code is 1 if any did.
Without a GPU, `--dry-run` runs what needs none: it collects the tests, and renders the report of a made-up device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import gpu
from benchmarks.ffn_cases import INNER, RELEASED, Case

PYTEST = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
SHORT = ["-k", "released or one_token", "-x"]


def step(name: str, command: Sequence[str], limit: int) -> bool:
    """Runs a step with its output shown; True if it succeeded within `limit` seconds."""
    print(f"== {name}: {' '.join(command)}", flush=True)
    start = time.monotonic()
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        code = -1
    verdict = "ok" if code == 0 else f"took more than {limit} s" if code == -1 else f"exit code {code}"
    print(f"== {name}: {verdict}, {time.monotonic() - start:.0f} s", flush=True)
    return code == 0


def stub_result() -> dict[str, object]:
    """A result of a device that does not exist, to see the report's form; never to be taken for a measurement."""
    rows = []
    for backward in (False, True):
        for inner in INNER:
            case = Case(RELEASED[0], "bf16", inner, 8192, backward, device="cuda")
            names = (*gpu.BASELINES, *gpu.OURS, "floor")
            rows.append({**vars(case), "seconds": dict.fromkeys(names, 1e-4), "refused": {}})
    return {"environment": {"date": "none", "device": "STUB, NOT A MEASUREMENT"}, "ffn": rows}


def dry_run() -> bool:
    collected = step("collect", [*PYTEST, "--collect-only"], 240)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stub.json"
        path.write_text(json.dumps(stub_result()))
        return step("report", [sys.executable, "-m", "benchmarks.gpu", "--show", str(path)], 60) and collected


def check(quick: bool) -> bool:
    build = "from kernels.cuda.build import library_path; print(library_path())"
    results = [step("build", [sys.executable, "-c", build], 180), step("test", PYTEST, 240)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("== sanitize: left out, compute-sanitizer is not installed")
    else:
        for tool in ("memcheck", "racecheck"):
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTEST, *SHORT]
            results.append(step(f"sanitize ({tool})", command, 90))
    results.append(step("measure", [sys.executable, "-m", "benchmarks.gpu", *(["--quick"] if quick else [])], 240))
    return all(results)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: collect tests, render a stub report")
    parser.add_argument("--full", action="store_true", help="all expressions and the autotuned torch.compile: longer")
    args = parser.parse_args()
    if args.dry_run:
        return 0 if dry_run() else 1
    if not torch.cuda.is_available():
        print(
            f"gpu-check: PyTorch {torch.__version__} finds no CUDA device: run it on a machine with an NVIDIA GPU and a"
            " CUDA build of PyTorch, or add ARGS=--dry-run",
            file=sys.stderr,
        )
        return 2
    return 0 if check(not args.full) else 1


if __name__ == "__main__":
    sys.exit(main())
