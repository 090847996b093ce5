"""How long strategy inherit takes for its block library, and whether a solved latency budget holds when measured.

    python -m benchmarks.inherit_library                      the demo: its teacher from the cache, or fine-tuned first
    python -m benchmarks.inherit_library --speedups 2 4 8

The library is that of `ffnas search` with the demo's data and teacher and at least 20 variants per layer; wanted: at
most 60 s. Then, per speed-up, the solver's best student of several sets of layers is assembled and measured; wanted: at
most 10 % above what was allowed. The first is a number of a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from search.config.options import parse
from search.config.schema import BudgetConfig
from search.console.progress import silent
from search.context import Context, prepare
from search.inherit.candidates import best_of_layers, first_layers
from search.inherit.latency import layer_milliseconds, student_milliseconds
from search.inherit.library import Library, build_library
from search.inherit.limits import budget_of
from search.inherit.strategy import choices
from search.inherit.total import Tables
from search.inherit.variants import kept
from search.ledger.ledger import Ledger
from search.pipeline import teach
from search.rundir import RunDir

SECONDS, ABOVE = 60.0, 1.1
"""What is wanted."""


def measure(folder: Path, speedups: Sequence[float], options: Sequence[str]) -> dict[str, Any]:
    """Builds a library in a run directory `folder` and measures students."""
    config, _ = parse(["--preset", "demo", "--strategy", "inherit", "--tracker", "none", *options])
    prepared = prepare(config, silent())
    prepared.teacher = teach(prepared, silent())
    with RunDir(folder).open() as rundir, contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(rundir.ledger))
        ctx = Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=silent())
        made = choices(ctx)
        processor = time.process_time()
        library = build_library(ctx, made)
        return {
            "environment": describe(),
            "layers": made.shape.num_layers,
            "variants": len(made.specs),
            "scored": len(made.alone),
            "seconds": round(ctx.seconds["library"], 2),
            "processor_seconds": round(time.process_time() - processor, 2),
            "speedups": list(speedups),
            "latency": [row for speedup in speedups for row in students(ctx, library, speedup)],
        }


def students(ctx: Context, library: Library, speedup: float) -> list[dict[str, Any]]:
    """Allowed, predicted and measured milliseconds of the best students of some sets of layers."""
    made = library.variants
    took = layer_milliseconds(ctx, library)
    budget = budget_of(ctx, made, Tables(ctx, made), lambda: took, BudgetConfig(speedup=speedup))
    count = made.shape.num_layers
    sets = [range(count), range(0, count, 2), (0, count - 1)]
    found = [first_layers(library, budget), *(best_of_layers(library, budget, layers) for layers in sets)]
    rows = []
    for architecture in dict.fromkeys(a for a in found if a is not None):
        number = {spec: k for k, spec in enumerate(made.specs)}
        measured = student_milliseconds(ctx, library.assemble(architecture).eval())
        rows.append(
            {
                "speedup": speedup,
                "layers": list(kept(architecture)),
                "allowed_ms": budget.limits[0] + took.rest,
                "predicted_ms": took.rest + sum(float(took.variants[number[layer]]) for layer in architecture.layers),
                "measured_ms": measured,
            }
        )
    return rows


def show(result: dict[str, Any]) -> str:
    """The numbers, and whether they are as wanted."""
    lines = [json.dumps(result["environment"])]
    lines.append(
        f"block library: {result['layers']} layers x {result['variants']} variants ({result['scored']} scored, the"
        f" others sums of two): {result['seconds']} s, {result['processor_seconds']} processor seconds"
        f" ({'within' if result['seconds'] <= SECONDS else 'above'} {SECONDS:g} s)"
    )
    for speedup in sorted(set(result["speedups"]) - {row["speedup"] for row in result["latency"]}):
        lines.append(f"speed-up {speedup:g}: no student is predicted to be that fast")
    for row in result["latency"]:
        above = row["measured_ms"] / row["allowed_ms"]
        lines.append(
            f"speed-up {row['speedup']:g}, layers {row['layers']}: allowed {row['allowed_ms']:.2f} ms, predicted"
            f" {row['predicted_ms']:.2f}, measured {row['measured_ms']:.2f}: {above:.2f} of what is allowed"
            f" ({'met' if above <= ABOVE else 'missed'})"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints, and says by its exit status whether all is as wanted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inherit_library",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--speedups", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("options", nargs="*", help="behind --: further options of ffnas search")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="ffnas-library-") as folder:
        result = measure(Path(folder) / "run", args.speedups, args.options)
    print(show(result))
    fine = result["seconds"] <= SECONDS
    return 0 if fine and all(r["measured_ms"] <= ABOVE * r["allowed_ms"] for r in result["latency"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
