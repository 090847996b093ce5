"""The command `python -m kernels.compile_check`; see the package."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed

from kernels.compile_check import __doc__ as description
from kernels.compile_check import calls, sources, units
from kernels.compile_check.table import Row, named, summary, table
from kernels.cuda.build import find_nvcc

ARCHITECTURES = (80, 90)


def work(architectures: Sequence[int], quick: bool) -> list[units.Unit]:
    """Everything to compile: source files first, which take longest."""
    found = [] if find_nvcc() is None else units.file_units(sources.files(quick), architectures)
    return found + units.triton_units(calls.calls(quick), architectures)


def compiled(todo: Sequence[units.Unit], processes: int) -> Iterator[list[Row]]:
    """The rows of every unit, as they come."""
    with ProcessPoolExecutor(processes) as workers:
        for future in as_completed([workers.submit(units.run_unit, unit) for unit in todo]):
            yield future.result()


def progress(done: int, total: int, start: float) -> None:
    """How far it is, and how long it will take; only on a terminal."""
    if sys.stderr.isatty():
        spent = time.monotonic() - start
        left = spent / done * (total - done)
        end = "\r" if done < total else "\n"
        print(f"[{done}/{total}] {done / spent:.1f} kernels/s, {left:.0f} s left   ", end=end, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.compile_check", description=(description or "").split("\n")[0]
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities times 10"
    )
    parser.add_argument("--quick", action="store_true", help="one program, one dtype, two generated programs, one .cu")
    parser.add_argument("--jobs", type=int, default=2, help="compilations at once")
    parser.add_argument("--summary", action="store_true", help="one line per kind of kernel")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # the code is the same, and compiled a tenth faster
    todo = work(options.arch, options.quick)
    if find_nvcc() is None:
        print("nvcc not found: csrc/cuda is not compiled")
    found: list[Row] = []
    for done, rows in enumerate(compiled(todo, options.jobs), 1):
        found += rows
        progress(done, len(todo), start)
        for row in rows:
            if row.problem:
                print(f"[{done}/{len(todo)}] {row.kernel} {row.variant} sm_{row.arch}: {row.problem}", flush=True)
    found = named(found)
    print(summary(found) if options.summary else table(found))
    failed = [row for row in found if row.problem]
    print(f"{len(found)} kernels, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
