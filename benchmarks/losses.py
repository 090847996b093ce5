"""One table: time and peak memory of losses and attention, eager (S×S kept) against ours, forward and backward.

    python -m benchmarks.losses                     both dtypes, S = 128, 384, 512, 2048; about ten minutes
    python -m benchmarks.losses --lengths 128 512 --dtypes fp32 --parts all
    OMP_NUM_THREADS=1 python -m benchmarks.losses   one thread

Times are medians of interleaved rounds (`benchmarks.timing`); ratios are eager / ours. Peak memory is what
`benchmarks.memory` counts for one layer of two sequences, each side in a process of its own. Cases and sides:
`benchmarks.losses_cases`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import describe
from benchmarks.losses_cases import DTYPES, LENGTHS, PARTS, SIDES, Case, runner
from benchmarks.memory import STATUS
from benchmarks.memory import peak_bytes as highest
from benchmarks.timing import interleaved


def peak_bytes(side: str, dtype: str, length: int) -> int:
    """Bytes one layer's pass over two sequences needs at its peak beyond its inputs; Linux only."""
    command = [sys.executable, "-m", "benchmarks.losses", "--one", side, dtype, str(length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def measure_peak(side: str, dtype: str, length: int) -> int:
    """The same in this process, which should have done nothing else."""
    runner(Case(dtype, 64, layers=1, sequences=2), side)()  # libraries loaded, threads started
    run = runner(Case(dtype, length, layers=1, sequences=2), side)
    return highest(run)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.losses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def row(case: Case, rounds: int) -> dict[str, object]:
    """Seconds of every side, and peak bytes where the whole is measured."""
    result: dict[str, object] = {**vars(case), "batch": case.batch}
    result["seconds"] = interleaved({side: runner(case, side) for side in SIDES}, rounds)
    if case.part == "all" and STATUS.exists():
        result["peak_bytes"] = {side: peak_bytes(side, case.dtype, case.length) for side in SIDES}
    return result


def show(case: Case, result: dict[str, object]) -> str:
    seconds: dict[str, float] = result["seconds"]  # type: ignore[assignment]
    line = f"{case!s:28}" + "".join(f"{seconds[s] * 1e3:10.1f}" for s in SIDES)
    line += "".join(f"{seconds['eager'] / seconds[s]:9.2f}" for s in SIDES[1:])
    peaks: dict[str, int] = result.get("peak_bytes", {})  # type: ignore[assignment]
    return line + "".join(f"{peaks[s] / 2**20:11.1f}" for s in SIDES if s in peaks)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.one:
        side, dtype, length = args.one
        print(measure_peak(side, dtype, int(length)))
        return 0
    environment = describe()
    print(json.dumps(environment))
    print(f"{'forward + backward, ms':28}" + "".join(f"{s:>10}" for s in SIDES), end="")
    print("".join(f"{'e/' + s[:6]:>9}" for s in SIDES[1:]) + "".join(f"  MiB:{s:>5.5}" for s in SIDES))
    rows = []
    for dtype in args.dtypes:
        for part in args.parts:
            for length in args.lengths:
                case = Case(dtype, length, part)
                rows.append(row(case, args.rounds))
                print(show(case, rows[-1]), flush=True)
    if args.out:
        args.out.write_text(json.dumps({"environment": environment, "losses": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
