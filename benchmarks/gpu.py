"""The FFN op on a CUDA device: both Triton tiers and the CUDA C++ routes against eager and torch.compile.

    python -m benchmarks.gpu [--quick] [--tokens 8192] [--dtypes bf16] [--budget SECONDS]
    python -m benchmarks.gpu --show benchmarks/results/FILE.json        print a result again as Markdown
    python -m benchmarks.gpu --readme benchmarks/results/FILE.json      put its table into README
    python -m benchmarks.gpu --rehearse                                 the same code on a CPU, tiny; no measurement

Every side (`benchmarks.gpu_cases`) is captured in a CUDA graph and replayed, so that launch overhead counts for none;
times are CUDA events, medians of interleaved rounds. The floor of a case is the larger of (FLOPs / rate of a large
matrix product) and (bytes of inputs and results / rate of a copy), both rates measured in the same run. Then follow
grouped launches, never-seen expressions and repeated bits (`benchmarks.gpu_checks`). Results go to benchmarks/results/
as JSON, written anew after every case, and as Markdown, losing cases included.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import gpu_checks, gpu_report, gpu_warm
from benchmarks.compare import RESULTS
from benchmarks.ffn_cases import DTYPES, HIDDEN, INNER, RELEASED, Case
from benchmarks.gpu_cases import BASELINES, OURS, floor, interleaved, rates, sides
from kernels.compile_check.call import Call

README = Path(__file__).resolve().parents[1] / "README.md"
Result = dict[str, object]


def environment(rehearsal: bool) -> dict[str, object]:
    """What the result was measured on."""
    import triton

    versions: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if rehearsal:
        return {"date": date, "device": "STUB, NOT A MEASUREMENT", **versions}
    device = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        driver = ""
    own = {"date": date, "device": device.name, "capability": [device.major, device.minor]}
    return {**own, **versions, "driver, clock": driver or "unknown"}


def cases(args: argparse.Namespace) -> list[tuple[Case, list[str]]]:
    """(case, sides), the most telling first: expressions come one after the other, the autotuned compiler last."""
    device, hidden, widths = ("cpu", 24, _widths(args)) if args.rehearse else ("cuda", HIDDEN, _widths(args))
    plain = [name for name in BASELINES if name != "compile-max"]
    found = [
        (Case(expression, dtype, inner, args.tokens, backward, hidden, device), [*plain, *OURS])
        for dtype in args.dtypes
        for expression in ((RELEASED[0], RELEASED[4]) if args.quick else RELEASED)
        for inner in widths
        for backward in (False, True)
    ]
    slow = [(case, ["compile-max", *OURS]) for case, _ in found if not args.quick or case.expression == RELEASED[0]]
    return found + slow


def run(args: argparse.Namespace, save: Callable[[Result], None]) -> Result:
    """Measures until all is done or the budget is spent; `save` gets the result so far after every step."""
    start = time.monotonic()
    todo = cases(args)
    device, rounds = todo[0][0].device, 1 if args.rehearse else 5 if args.quick else 15
    result: Result = {"environment": environment(args.rehearse), "ffn": [], "left_out": 0}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        count = gpu_warm.compile_ahead(_calls(args, todo[0][0]), 10 * major + minor)
        print(f"compiled {count} kernels ahead, {time.monotonic() - start:.0f} s", flush=True)
    _checks(args, todo[0][0], rounds, result)
    save(result)
    known = {dtype: rates(DTYPES[dtype], device) for dtype in args.dtypes}
    rows: list[dict[str, object]] = result["ffn"]  # type: ignore[assignment]
    for done, (case, names) in enumerate(todo):
        if time.monotonic() - start > args.budget:
            result["left_out"] = len(todo) - done
            break
        graphs, refused = sides(case, names)
        seconds = interleaved(graphs, rounds, device)
        seconds["floor"] = floor(case, *known[case.dtype])
        rows.append({**vars(case), "seconds": seconds, "refused": refused})
        print(f"{case}: " + ", ".join(f"{k} {v * 1e6:.0f} us" for k, v in seconds.items()), flush=True)
        save(result)
    save(result)
    return result


def _calls(args: argparse.Namespace, first: Case) -> list[Call]:
    """What the table's cases, the grouped stacks and never-seen expressions launch."""
    pairs = gpu_checks.members(_widths(args))
    stacks = [replace(first, expression=text, inner=width, backward=True) for text, width, _ in pairs]
    unseen = replace(first, inner=_widths(args)[1])
    return gpu_warm.calls([*(case for case, _ in cases(args)), *stacks]) + gpu_warm.any_expression(unseen)


def _widths(args: argparse.Namespace) -> tuple[int, ...]:
    return (24, 12, 8, 7) if args.rehearse else INNER


def _checks(args: argparse.Namespace, case: Case, rounds: int, result: Result) -> None:
    """The checks besides the table; one that fails does not keep the others from running."""
    device, hidden, dtype = case.device, case.hidden, case.dtype
    widths = _widths(args)
    tokens, count = (8, 3) if args.rehearse else (gpu_checks.GROUP_TOKENS, 60)
    both = Case(case.expression, dtype, case.inner, case.tokens, True, hidden, device)
    problems: dict[str, str] = {}
    steps: dict[str, Callable[[], object]] = {
        "grouped": lambda: gpu_checks.grouped(dtype, hidden, widths, tokens, device, rounds),
        "never_seen": lambda: gpu_checks.never_seen(hidden, widths[1], case.tokens, dtype, device, count),
        "repeated": lambda: gpu_checks.repeated(both),
        "agreement": lambda: gpu_checks.agreement(case),
    }
    for name, measure in steps.items():
        try:
            result[name] = measure()
        except Exception as error:  # part of the result
            problems[name] = f"{type(error).__name__}: {error}"[:300]
    result["problems"] = problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two expressions, autotuned torch.compile for one")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--rehearse", action="store_true", help="run the code on a CPU; the result is marked a stub")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result again as Markdown; measures nothing")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put a result's table into README")
    args = parser.parse_args(argv)
    if args.show or args.readme:
        return _printed(args)
    if not args.rehearse and not torch.cuda.is_available():
        print(
            "benchmarks.gpu: no CUDA device, or a PyTorch without CUDA; --show prints an earlier result",
            file=sys.stderr,
        )
        return 2
    if args.rehearse and args.out is None:
        print("--rehearse: needs --out FOLDER, since its result is no measurement", file=sys.stderr)
        return 2
    path: Path | None = None

    def save(result: Result) -> None:
        nonlocal path
        own: dict[str, object] = result["environment"]  # type: ignore[assignment]
        slug = re.sub(r"[^a-z0-9]+", "-", str(own["device"]).lower()).strip("-")
        path = (args.out or RESULTS) / f"{slug}-{str(own['date'])[:10]}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".md").write_text(gpu_report.markdown(result))

    run(args, save)
    assert path is not None
    print(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


def _printed(args: argparse.Namespace) -> int:
    file = args.show or args.readme
    if not file.is_file():
        print(f"{'--show' if args.show else '--readme'}: no file {file}; results are in {RESULTS}", file=sys.stderr)
        return 2
    result = json.loads(file.read_text())
    if args.show:
        print(gpu_report.markdown(result))
        return 0
    try:
        gpu_report.into_readme(result, README)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
