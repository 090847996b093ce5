"""Peak memory of one forward and backward pass, eager against ffnas, as the system counts it.

    python -m benchmarks.memory [--tokens 4096]

Each side runs in processes of its own; reported is the median of three, since what an allocator keeps differs from run
to run (eager by up to a third). Counted is the highest resident size during a pass over the resident size before it, so
results, gradients, saved tensors and scratch memory all count; inputs and weights do not. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
PROCESSES = 3
"""Processes per case and side."""


def resident_bytes(field: str = "VmRSS") -> int:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def peak_bytes(run: Callable[[], object]) -> int:
    """Bytes a call of `run` needs at its peak, beyond what is there before it; call it in a process of its own."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run()
    return resident_bytes("VmHWM") - before


def measure(expression: str, dtype: str, inner: int, tokens: int, side: str) -> int:
    """Bytes one pass needs at its peak, beyond what was there before."""
    from benchmarks.ffn_cases import Case, runner

    runner(Case(expression, dtype, inner, 64, True), side)()  # libraries loaded, threads started
    run = runner(Case(expression, dtype, inner, tokens, True), side)
    return peak_bytes(run)


def ratios(tokens: int, dtypes: tuple[str, ...] = ("fp32", "bf16")) -> list[dict[str, object]]:
    """Peak bytes of both sides for the widest and the narrowest d and two expressions."""
    from benchmarks.ffn_cases import INNER, RELEASED

    rows: list[dict[str, object]] = []
    for dtype in dtypes:
        for inner in (INNER[0], INNER[-1]):
            for expression in (RELEASED[0], RELEASED[4]):
                peak = {side: _in_process(expression, dtype, inner, tokens, side) for side in ("eager", "ffnas")}
                rows.append({"expression": expression, "dtype": dtype, "inner": inner, "tokens": tokens, **peak})
    return rows


def report(rows: list[dict[str, object]]) -> str:
    lines = ["peak memory of forward + backward, MiB:     eager   ffnas   share"]
    for row in rows:
        eager, own = int(row["eager"]), int(row["ffnas"])  # type: ignore[call-overload]
        name = f"{row['dtype']} T={row['tokens']} d={row['inner']} {row['expression']}"
        lines.append(f"  {name:<72} {eager / 2**20:7.1f} {own / 2**20:7.1f} {own / eager:7.0%}")
    shares = [int(row["ffnas"]) / int(row["eager"]) for row in rows]  # type: ignore[call-overload]
    lines.append(f"  {'geometric mean':<88} {statistics.geometric_mean(shares):7.0%}")
    return "\n".join(lines)


def _in_process(expression: str, dtype: str, inner: int, tokens: int, side: str) -> int:
    arguments = [expression, dtype, str(inner), str(tokens), side]
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *arguments]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(PROCESSES)]
    return int(statistics.median(int(out.split()[-1]) for out in runs))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        expression, dtype, inner, tokens, side = args.one
        print(measure(expression, dtype, int(inner), int(tokens), side))
    else:
        print(report(ratios(args.tokens)))


if __name__ == "__main__":
    main()
