"""Everything a machine with an NVIDIA GPU should confirm and measure, in one command of eight minutes.

    python -m benchmarks.gpu_check --out FOLDER          (FOLDER: $OUT where that is set, else benchmarks/results/gpu)
    python -m benchmarks.gpu_check --only accuracy ffn   some of the steps
    python -m benchmarks.gpu_check --dry-run             all of it on a CPU, with stand-ins; about a minute

Works in a plain checkout, without installation or network, with torch, triton, numpy, transformers and pytest. Steps:

    build      the CUDA C++ kernels (from the cache, if they are there)
    machine    versions; ceilings of copy and product; rows of 540 against 544 columns
    compile    everything the other steps launch, on all processors
    accuracy   forward and gradients against float64 at real sizes, uninitialized memory filled with NaN
    kernels    times of single kernels, six shapes, every tier
    ffn        eager, torch.compile and ours; in a CUDA graph and without; autocast
    tiles      tile sizes: FOLDER/tiles.json, to be committed as kernels/triton/tiles/sm_90.json
    tests      the tests marked `gpu`, several processes, a limit per test
    memcheck, racecheck   a few tests of the CUDA C++ kernels under compute-sanitizer, where that is installed
    steps      captured population steps and the mixed step
    checks     grouped launches, never-seen expressions, repeated bits

Every step is a process of its own with a limit of its own, so one that hangs, or leaves the device unusable, costs no
other step its time; a step that died is started again behind the case it died in, as long as its limit lasts. Results
are in FOLDER, six flat files at most: results.jsonl (a line as soon as a case begins and ends), report.md, tiles.json,
steps.log, tests.log, sanitizer.log. The exit code is 1 where a step did not end well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu import records, report
from kernels.build import find_compiler
from kernels.cuda.build import find_nvcc

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/kernels/test_exact_products.py", "tests/kernels/test_capture.py", "tests/kernels/test_triton_ffn.py",
    "tests/kernels/test_triton_losses.py", "tests/kernels/test_triton_crf.py", "tests/kernels/test_cuda_backend.py",
    "tests/engine/test_step_graphs.py", "tests/engine/test_data_parts.py",
)  # fmt: skip
"""Files with tests marked `gpu`; none needs more than torch, triton, numpy, transformers and pytest."""
SANITIZED = "tests/kernels/test_cuda_backend.py"
PYTEST = (sys.executable, "-m", "pytest", "-v", "--tb=line", "-m", "gpu", "-p", "no:cacheprovider")
RECORDED = ("-p", "benchmarks.gpu.recorder")
SHORT = ("-k", "test_on_a_gpu and bf16 and stack")
"""Calls that launch CUDA C++ kernels only: under a sanitizer Triton's would take the time of all of them."""
BUILD = "from kernels.cuda.build import library_path; print(library_path())"
HIDDEN = (
    "optuna", "jsonargparse", "datasets", "scipy", "sklearn", "torchmetrics", "matplotlib", "rich", "tensorboard",
    "hypothesis", "xdist", "pytest_timeout", "pytest_benchmark", "pytest_cov",
)  # fmt: skip
"""Packages a rehearsal does without, as the machine it stands for may."""
_MOST_STARTS = 40


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, how many of it run beside each other, and the file its output goes to."""

    name: str
    command: Sequence[str]
    limit: float
    copies: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str = "steps.log"


def run(step: Step, out: Path) -> bool:
    """Runs a step, and again where it died; True if all of it ended well in time."""
    print(f"== {step.name}: at most {step.limit:.0f} s: {' '.join(step.command)}", flush=True)
    start = time.monotonic()
    with ThreadPoolExecutor(step.copies) as pool:
        states = list(pool.map(lambda k: _process(step, k, start + step.limit, out), range(step.copies)))
    state = next((s for s in states if s != "ok"), "ok")
    took = time.monotonic() - start
    line = {"family": "script", "step": step.name, "state": state, "seconds": round(took, 1)}
    records.append(out / records.NAME, line)
    print(f"== {step.name}: {state}, {took:.0f} s", flush=True)
    return state == "ok"


def _process(step: Step, copy: int, end: float, out: Path) -> str:
    """How copy number `copy` of a step ended, "ok" if well; its output is appended to the step's log."""
    environment = {**os.environ, **step.environment, "FFNAS_SHARE": f"{copy}/{step.copies}"}
    state = "never ran"
    for deaths in range(_MOST_STARTS):
        left = end - time.monotonic()
        if left <= 0:
            break
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(
                step.command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
            log.seek(0)
            with open(out / step.log, "ab") as kept:
                kept.write(f"== {step.name}\n".encode() + log.read())
        if code is None:
            return f"took more than {step.limit:.0f} s"
        state = "ok" if code == 0 else f"exit code {code}"
        if code >= 0 and code != records.BROKEN:  # it has ended by itself
            return f"{state}, after it died {deaths} times" if deaths else state
    return state


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process and of those it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def family(name: str, limit: float, *options: str) -> Step:
    """A step that runs a family of `benchmarks.gpu`."""
    return Step(name, (sys.executable, "-m", "benchmarks.gpu", name, *options), limit)


def steps(out: Path) -> list[Step]:
    """The steps on a machine with a GPU; their limits add up to eight minutes."""
    where = ("--out", str(out))
    found = [
        Step("build", (sys.executable, "-c", BUILD), 40), family("machine", 20, *where), family("compile", 70, *where),
        family("accuracy", 55, *where), family("kernels", 40, *where), family("ffn", 75, *where),
        family("tiles", 60, *where), tests(out, 50, copies=min(8, os.cpu_count() or 1)),
    ]  # fmt: skip
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        command = (str(sanitizer), "--tool", tool, "--error-exitcode", "9", *PYTEST, *SHORT, SANITIZED)
        # PyTorch's allocator would hide an access past the end of a tensor in a larger block of its own
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else {}
        found.append(Step(tool, command, 15, environment={**PLAIN, **uncached}, log="sanitizer.log"))
    if sanitizer is None:
        print("== memcheck, racecheck: left out, compute-sanitizer is not installed", flush=True)
    return [*found, family("steps", 25, *where), family("checks", 15, *where)]


PLAIN = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
"""No plugin of pytest but those that are named: the tests need none."""


def tests(out: Path, limit: float, *options: str, copies: int) -> Step:
    """The tests marked `gpu`, shared among `copies` processes."""
    environment = {**PLAIN, "FFNAS_RECORDS": str(out / records.NAME), "FFNAS_TEST_LIMIT": "20"}
    return Step("tests", (*PYTEST, *RECORDED, *options, *TESTS), limit, copies, environment, "tests.log")


def dry_steps(out: Path) -> list[Step]:
    """All steps on a CPU: tiny sizes under Triton's interpreter, graphs that only call, eager for torch.compile.

    The tests are collected and skip themselves; kernels are compiled for sm_90 as on a device.
    """
    path = [str(ROOT / "benchmarks/gpu/hidden"), os.environ.get("PYTHONPATH", "")]
    hide = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "FFNAS_HIDDEN": ",".join(HIDDEN), "OMP_NUM_THREADS": "1"}
    emulated = {**hide, "TRITON_INTERPRET": "1"}
    where = ("--rehearse", "--out", str(out))
    names = ("machine", "accuracy", "kernels", "ffn", "tiles", "steps", "checks")
    found = [Step(f.name, f.command, f.limit, 1, emulated) for f in (family(name, 300, *where) for name in names)]
    compiled = family("compile", 300, *where)
    found.insert(1, Step(compiled.name, compiled.command, compiled.limit, 1, hide))
    collected = tests(out, 300, copies=1)
    found.insert(6, Step("tests", collected.command, 300, 1, {**hide, **collected.environment}, collected.log))
    if find_nvcc() is None or find_compiler() is None:
        print("== build: left out, nvcc is not installed", flush=True)
        return found
    return [Step("build", (sys.executable, "-c", BUILD), 300), *found]


def check(todo: Sequence[Step], out: Path) -> bool:
    """Runs the steps and writes the report; True if all ended well."""
    start = time.monotonic()
    results = [run(step, out) for step in todo]
    lines = records.read(out / records.NAME)
    (out / "report.md").write_text(report.markdown(lines), encoding="utf-8")
    print("\n".join([*report.verdicts(lines), *report.summaries(report.table(lines)), *report.others(lines)]))
    took = time.monotonic() - start
    print(f"== all: {sum(results)} of {len(results)} steps ok, {took:.0f} s; results in {out}", flush=True)
    return all(results)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps, in their usual order")
    parser.add_argument("--full", action="store_true", help="every expression, autotuned torch.compile; hours")
    parser.add_argument("--dry-run", action="store_true", help="all of it on a CPU, with stand-ins")
    args = parser.parse_args(argv)
    out = (args.out or Path(os.environ.get("OUT") or ROOT / "benchmarks/results/gpu")).resolve()
    if not args.dry_run and not torch.cuda.is_available():
        print(
            f"gpu-check: PyTorch {torch.__version__} finds no CUDA device: run it on a machine with an NVIDIA GPU and a"
            " CUDA build of PyTorch, or add --dry-run",
            file=sys.stderr,
        )
        return 2
    out.mkdir(parents=True, exist_ok=True)
    todo = dry_steps(out) if args.dry_run else steps(out)
    unknown = sorted(set(args.only or ()) - {step.name for step in todo})
    if unknown:
        print(f"--only: no step {', '.join(unknown)}; there are {', '.join(s.name for s in todo)}", file=sys.stderr)
        return 2
    todo = [step for step in todo if not args.only or step.name in args.only]
    if args.full:
        todo = [Step(s.name, _full(s), 60 * s.limit, s.copies, s.environment, s.log) for s in todo]
    return 0 if check(todo, out) else 1


def _full(step: Step) -> Sequence[str]:
    return (*step.command, "--full") if "benchmarks.gpu" in step.command else step.command


if __name__ == "__main__":
    sys.exit(main())
