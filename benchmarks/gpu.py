"""The FFN op on a CUDA device: both Triton tiers and the CUDA C++ routes against eager and torch.compile.

    python -m benchmarks.gpu [--quick] [--tokens 8192] [--dtypes bf16]
    python -m benchmarks.gpu --show benchmarks/results/FILE.json        print a result again as Markdown

Every side is captured in a CUDA graph and replayed, so that launch overhead counts for none; times are CUDA events,
medians of interleaved rounds. The floor of a case is the larger of (FLOPs / rate of a large matrix product) and (bytes
of inputs and results / rate of a copy), both rates measured in the same run. Results go to benchmarks/results/ as
JSON and as a Markdown table, losing cases included.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.compare import RESULTS, geometric_mean
from benchmarks.ffn_cases import DTYPES, INNER, RELEASED, Case, runner
from kernels import use_backend

OURS = {
    "triton interpreter": ("triton", {"FFNAS_SPECIALIZE": "0"}),
    "triton specialized": ("triton", {"FFNAS_SPECIALIZE": "always"}),
    "cuda rows": ("cuda", {"FFNAS_CUDA_ROUTE": "rows", "FFNAS_SPECIALIZE": "0"}),
    "cuda stack": ("cuda", {"FFNAS_CUDA_ROUTE": "stack", "FFNAS_SPECIALIZE": "0"}),
}
"""Side -> backend and environment. The environment is read per call, so it must hold while a graph is captured."""
BASELINES = ("eager", "compile", "compile-max")
Row = dict[str, object]


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """`run` captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def sides(case: Case, names: Sequence[str]) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """(graphs by side, reason by side that cannot serve)."""
    graphs, refused = {}, {}
    for name in names:
        backend, environment = OURS.get(name, (None, {}))
        before = {k: os.environ.get(k) for k in environment}
        os.environ.update(environment)
        try:
            with use_backend(backend, strict=True) if backend else nullcontext():
                graphs[name] = graphed(runner(case, "ffnas" if backend else name))
        except RuntimeError as error:  # a side that cannot run is part of the result
            refused[name] = str(error).splitlines()[0]
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    return graphs, refused


def interleaved(graphs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds per replay; every timed stretch lasts about 10 ms."""
    repeats = {name: max(1, round(0.01 / max(_seconds(g, 3) / 3, 1e-7))) for name, g in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for _ in range(rounds):
        for name in order:
            times[name].append(_seconds(graphs[name], repeats[name]) / repeats[name])
        order.reverse()
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(run: Callable[[], None], count: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of an 8192^3 product, bytes/s of a 1 GiB copy, read and written)."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    product = min(_seconds(lambda: torch.mm(a, a), 5) / 5 for _ in range(3))
    b = torch.empty(2**28, device="cuda", dtype=torch.float32)
    c = torch.empty_like(b)
    copy = min(_seconds(lambda: c.copy_(b), 5) / 5 for _ in range(3))
    return 2 * 8192**3 / product, 2 * 4 * 2**28 / copy


def floor(case: Case, flops: float, bandwidth: float) -> float:
    """Seconds no implementation can go below: see the module."""
    t, h, d = case.tokens, case.hidden, case.inner
    products = 4 * t * h * d * (3 if case.backward else 1)
    size = torch.empty(0, dtype=DTYPES[case.dtype]).element_size()
    moved = size * (2 * t * h + 2 * h * d) * (2 if case.backward else 1)
    return max(products / flops, moved / bandwidth)


def run(args: argparse.Namespace) -> dict[str, object]:
    names = [*BASELINES[: 2 if args.quick else 3], *OURS]
    expressions = (RELEASED[0], RELEASED[4]) if args.quick else RELEASED
    rows: list[Row] = []
    for dtype in args.dtypes:
        flops, bandwidth = rates(DTYPES[dtype])
        for backward in (False, True):
            for inner in INNER:
                for expression in expressions:
                    case = Case(expression, dtype, inner, args.tokens, backward, device="cuda")
                    graphs, refused = sides(case, names)
                    seconds = interleaved(graphs, 5 if args.quick else 15)
                    seconds["floor"] = floor(case, flops, bandwidth)
                    rows.append({**vars(case), "seconds": seconds, "refused": refused})
                    print(f"{case}: " + ", ".join(f"{k} {v * 1e6:.0f} us" for k, v in seconds.items()), flush=True)
    import triton

    device = torch.cuda.get_device_properties(0)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "environment": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": device.name,
            "capability": [device.major, device.minor],
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver": driver.stdout.strip() or "unknown",
        },
        "ffn": rows,
    }


def markdown(result: dict[str, object]) -> str:
    """Geometric means per dtype and direction, then every losing case."""
    rows: list[Row] = result["ffn"]  # type: ignore[assignment]
    environment: dict[str, object] = result["environment"]  # type: ignore[assignment]
    lines = [
        "Conditions: " + ", ".join(f"{k} {v}" for k, v in environment.items()) + "; CUDA-graph replay on all sides.",
        "",
    ]
    for dtype, backward in dict.fromkeys((r["dtype"], r["backward"]) for r in rows):
        members = [r for r in rows if (r["dtype"], r["backward"]) == (dtype, backward)]
        direction = "forward + backward" if backward else "forward"
        title = f"{dtype}, {direction}, {members[0]['tokens']} tokens, H = {members[0]['hidden']}"
        lines += [f"{title}: other side's time / ours (geometric mean, smallest)", ""]
        lines += ["| ours | " + " | ".join((*BASELINES, "floor")) + " |", "|---" * (len(BASELINES) + 2) + "|"]
        for own in OURS:
            cells = [_cell(members, side, own) for side in (*BASELINES, "floor")]
            lines.append(f"| {own} | " + " | ".join(cells) + " |")
        lines.append("")
    lines.append("Cases in which ours is slower than eager or torch.compile:")
    for row in rows:
        seconds: dict[str, float] = row["seconds"]  # type: ignore[assignment]
        for own in OURS:
            for side in BASELINES:
                if own in seconds and side in seconds and seconds[own] > seconds[side]:
                    what = (
                        f"{row['dtype']} {'fwd+bwd' if row['backward'] else 'fwd'} d={row['inner']} {row['expression']}"
                    )
                    lines.append(f"- {own} {seconds[side] / seconds[own]:.2f} of {side}: {what}")
    reasons = sorted({f"- {k}: {v}" for r in rows for k, v in r["refused"].items()})  # type: ignore[union-attr]
    return "\n".join([*lines, "", "Sides that could not run:", *(reasons or ["- none"])]) + "\n"


def _cell(rows: Sequence[Row], side: str, own: str) -> str:
    values = [r["seconds"][side] / r["seconds"][own] for r in rows if {side, own} <= set(r["seconds"])]  # type: ignore[index, call-overload]
    return f"{geometric_mean(values):.2f} ({min(values):.2f})" if values else "-"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two expressions, no autotuned torch.compile")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bf16"])
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print a result again as Markdown; measures nothing")
    args = parser.parse_args(argv)
    if args.show:
        print(markdown(json.loads(args.show.read_text())))
        return 0
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu: no CUDA device, or a PyTorch without CUDA; --show prints an earlier result",
            file=sys.stderr,
        )
        return 2
    result = run(args)
    environment: dict[str, object] = result["environment"]  # type: ignore[assignment]
    slug = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
    path = (args.out or RESULTS) / f"{slug}-{str(environment['date'])[:10]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result))
    print(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
