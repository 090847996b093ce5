"""One table: ffnas against eager PyTorch and torch.compile, with the floor, for the FFN op on this machine's CPU.

    python -m benchmarks.compare                      all six expressions at 4096 tokens; six minutes on 2 cores
    python -m benchmarks.compare --part 1/6           a sixth of the cases, into a file of its own
    python -m benchmarks.compare --merge FILE...      the parts as one result
    python -m benchmarks.compare --quick              two expressions, no torch.compile; about three minutes
    python -m benchmarks.compare --tokens 128 1024    other shapes
    OMP_NUM_THREADS=1 python -m benchmarks.compare    one thread

torch.compile takes seconds a case, so each expression is compiled at one of the four widths only, the widths taking
turns (`--compile-all`: at all). Ratios are other side / ffnas: above 1, ffnas is faster. Times are medians of
interleaved rounds (`benchmarks.timing`).
Cases that lose are listed. The result goes to benchmarks/results/ as JSON; `--show FILE` prints such a file again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import cold, memory
from benchmarks.environment import describe
from benchmarks.ffn_cases import DTYPES, INNER, RELEASED, SIDES, Case, runner
from benchmarks.timing import interleaved

RESULTS = Path(__file__).parent / "results"
Row = dict[str, object]


def measure(case: Case, sides: Sequence[str], rounds: int) -> Row:
    """Seconds of every side, with the case."""
    return {**vars(case), "seconds": interleaved({side: runner(case, side) for side in sides}, rounds)}


def cases(args: argparse.Namespace) -> list[Case]:
    expressions = (RELEASED[0], RELEASED[4]) if args.quick else RELEASED
    return [
        Case(expression, dtype, inner, tokens, backward)
        for dtype in args.dtypes
        for backward in (False, True)
        for tokens in args.tokens
        for inner in INNER
        for expression in expressions
    ]


def is_compiled(case: Case) -> bool:
    """Whether torch.compile is measured in this case: one width per expression, all widths in turn."""
    return case.expression in RELEASED and case.inner == INNER[RELEASED.index(case.expression) % len(INNER)]


def has(row: Row, side: str) -> bool:
    return side in row["seconds"]  # type: ignore[operator]


def ratio(row: Row, side: str) -> float:
    seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
    return seconds[side] / seconds["ffnas"]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def table(rows: list[Row]) -> str:
    """Geometric means and extremes per dtype, direction and tokens, then every case that loses."""
    sides = [side for side in (*SIDES, "floor") if side != "ffnas" and any(has(r, side) for r in rows)]
    lines = [f"{'':34}" + "".join(f"{side + ' / ffnas':>24}" for side in sides)]
    groups = {(r["dtype"], r["backward"], r["tokens"]) for r in rows}
    for dtype, backward, tokens in sorted(groups, key=lambda g: (-len(str(g[0])), str(g[0]) != "fp32", g[1], g[2])):
        members = [r for r in rows if (r["dtype"], r["backward"], r["tokens"]) == (dtype, backward, tokens)]
        cells = []
        for side in sides:
            values = [ratio(r, side) for r in members if has(r, side)]
            cells.append(f"{geometric_mean(values):8.2f} ({min(values):.2f}-{max(values):.2f})" if values else "")
        name = f"{dtype} {'forward+backward' if backward else 'forward'} {tokens} tokens"
        lines.append(f"{name:<34}" + "".join(f"{cell:>24}" for cell in cells))
    for side in sides:
        if side == "floor":
            continue
        measured = [r for r in rows if has(r, side)]
        losing = [r for r in measured if ratio(r, side) < 1]
        lines.append(f"slower than {side}: {len(losing)} of {len(measured)} cases")
        lines += [f"    {ratio(r, side):.2f}  {_case(r)}" for r in sorted(losing, key=lambda r: ratio(r, side))]
    return "\n".join(lines)


def _case(row: Row) -> Case:
    return Case(**{name: row[name] for name in Case.__dataclass_fields__})  # type: ignore[arg-type]


def show(result: dict[str, object]) -> str:
    parts = [json.dumps(result["environment"]), *([table(result["ffn"])] if result["ffn"] else [])]  # type: ignore[arg-type]
    if "cold" in result:
        parts.append(cold.report(result["cold"]))  # type: ignore[arg-type]
    if "memory" in result:
        parts.append(memory.report(result["memory"]))  # type: ignore[arg-type]
    return "\n".join(parts)


def result_path(environment: dict[str, object]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment["processor"]).lower()).strip("-")
    return RESULTS / f"ffn-{slug}-{environment['threads']}-threads-{str(environment['date'])[:10]}.json"


def part(text: str) -> tuple[int, int]:
    """`K/N` with 1 <= K <= N."""
    which, _, count = text.partition("/")
    if not (which.isdigit() and count.isdigit() and 1 <= int(which) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r}: give K/N with 1 <= K <= N, such as 1/6")
    return int(which), int(count)


def merged(files: Sequence[Path]) -> dict[str, object]:
    """The parts as one result, under the first one's environment.

    Raises:
        ValueError: the parts come from different machines, threads or versions, or repeat a case.
    """
    results = [json.loads(f.read_text()) for f in files]
    for f, other in zip(files, results, strict=True):
        for name, value in results[0]["environment"].items():
            if name != "date" and other["environment"][name] != value:
                raise ValueError(f"--merge: {f} has {name} {other['environment'][name]!r}, {files[0]} has {value!r}")
    rows = [row for r in results for row in r["ffn"]]
    if len({_case(row) for row in rows}) != len(rows):
        raise ValueError("--merge: a case is in more than one file; give each part once")
    result = {k: v for r in reversed(results) for k, v in r.items()}
    order = {case: k for k, case in enumerate(cases(parse([])))}
    rows.sort(key=lambda row: order.get(_case(row), 0))
    return {**result, "environment": results[0]["environment"], "ffn": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two expressions, eager and floor only, fewer rounds")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--sides", nargs="+", choices=[*SIDES, "floor"], help="ffnas is always among them")
    parser.add_argument("--rounds", type=int, help="default 25, quick 5")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/, named after the processor)")
    parser.add_argument("--compile-all", action="store_true", help="torch.compile in every case")
    parser.add_argument("--part", type=part, metavar="K/N", help="every N-th case from the K-th on; the rest in 1/N")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="join parts and measure nothing")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result again and measure nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.show:
        if not args.show.is_file():
            print(f"--show: no file {args.show}; results are in {RESULTS}", file=sys.stderr)
            return 2
        print(show(json.loads(args.show.read_text())))
        return 0
    if args.merge:
        missing = [str(f) for f in args.merge if not f.is_file()]
        if missing:
            print(f"--merge: no file {', '.join(missing)}", file=sys.stderr)
            return 2
        try:
            return write(merged(args.merge), args.out)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return write(measure_all(args), args.out)


def measure_all(args: argparse.Namespace) -> dict[str, object]:
    """The result of the cases asked for."""
    sides = args.sides or (["eager", "floor"] if args.quick else ["eager", "compile", "floor"])
    sides = ["ffnas", *(s for s in sides if s != "ffnas")]
    environment = describe()
    which, count = args.part or (1, 1)
    todo = cases(args)[which - 1 :: count]
    rows: list[Row] = []
    for k, case in enumerate(todo, 1):
        own = [s for s in sides if s != "compile" or args.compile_all or is_compiled(case)]
        rows.append(measure(case, own, args.rounds or (5 if args.quick else 25)))
        others = " ".join(f"{side} {ratio(rows[-1], side):.2f}" for side in own[1:])
        print(f"[{k}/{len(todo)}] {case}: {others}", file=sys.stderr, flush=True)
    result: dict[str, object] = {"environment": environment, "ffn": rows}
    if which == 1:
        result["cold"] = cold.cold_costs(200)
        if memory.STATUS.exists():
            result["memory"] = memory.ratios(4096)
    return result


def write(result: dict[str, object], out: Path | None) -> int:
    """Prints the result and writes it."""
    print(show(result))
    out = out or result_path(result["environment"])  # type: ignore[arg-type]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
