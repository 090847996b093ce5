"""Found models against the obvious alternatives, over tasks, budgets and seeds.

    python -m benchmarks.found --data FOLDER                      all tasks, two budgets, three seeds: hours
    python -m benchmarks.found --data FOLDER --tasks sst2 --seeds 0 --budgets 0.25
    python -m benchmarks.found --show                             prints the last result

Every search is `ffnas search` with the preset `demo` and the task's files; it finishes the winners of three groups with
one recipe: solved students, uniform students as one would make them by hand, random students. Beside them stand the
teacher, a bag of words and a constant answer. Reported is the dev split, which nothing is chosen on.

FOLDER holds sst2, cola, mrpc, stsb (train.csv, dev.csv) and streams/agnews, streams/dbpedia likewise; the task `demo`
needs no files. An interrupted benchmark goes on where it stopped; rows of other tasks, budgets and seeds stay in the
result, so that it can be measured in parts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import describe
from engine.files import write_json_atomic
from kernels.cache import cache_dir

OUT = Path(__file__).parent / "results" / "found.json"
TASKS: dict[str, tuple[str, ...]] = {
    "demo": (),
    "sst2": ("sst2", "--data.max_train", "20000"),
    "cola": ("cola", "--data.metric", "mcc"),
    "mrpc": ("mrpc", "--data.metric", "f1", "--data.max_length", "80"),
    "stsb": ("stsb", "--data.metric", "spearman", "--data.label_column", "score"),
    "agnews": ("streams/agnews",),
    "dbpedia": ("streams/dbpedia",),
}
"""Folder and further options of every task."""

FEW = 6
"""Runs below which resampling them says nothing about the mean."""

RIVALS = ("uniform", "random", "bag_of_words", "teacher")


def options(task: str, data: Path | None) -> list[str]:
    """Options that name a task's files."""
    folder, *rest = TASKS[task] or ("",)
    if not folder:
        return []
    if data is None:
        raise SystemExit(f"--data: task {task} needs the folder with its files")
    files = [data / folder / f"{split}.csv" for split in ("train", "dev")]
    return ["--data.train", str(files[0]), "--data.dev", str(files[1]), *rest]


def search(task: str, budget: float, seed: int, given: Sequence[str], runs: Path) -> dict[str, Any]:
    """The summary of one search; a finished one is not repeated."""
    run = runs / f"{task}-{budget:g}-{seed}"
    if not (run / "summary.json").is_file():
        if (run / "config.yaml").is_file():
            arguments = ["--resume", str(run)]
        else:
            own = ["--preset", "demo", "--runs", str(runs), "--name", run.name, "--seed", str(seed)]
            arguments = [*own, "--budget.encoder", str(budget), "--tracker", "none", *given]
        subprocess.run([sys.executable, "-m", "search.run", *arguments], check=True, stdout=sys.stderr)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def row(task: str, budget: float, summary: dict[str, Any]) -> dict[str, Any]:
    """What of a summary is compared."""
    evidence = summary["evidence"]
    models = {m["name"]: m for m in evidence["models"]}
    return {
        "task": task,
        "budget": budget,
        "seed": summary["seed"],
        "metric": evidence["metric"],
        "rows": evidence["rows"],
        "threads": (evidence["speed"] or {}).get("threads"),
        "minutes": round(sum(summary["seconds"].values()) / 60, 2),
        "chosen": summary["inherit"]["chosen"],
        "divergence": summary["inherit"]["divergence"],
        "scores": {name: m["metric"]["value"] for name, m in models.items()},
        "differences": {name: m["difference"] for name, m in models.items() if m["difference"]},
        "encoder": {name: m["params"]["encoder"] for name, m in models.items() if m["params"]},
        "milliseconds": {name: _one_sequence(m["speed"]) for name, m in models.items() if m["speed"]},
        "architecture": summary["best"]["architecture"],
    }


def with_row(rows: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with a new one, in place of one of the same task, budget and seed; by task, budget and seed."""
    order = list(TASKS)
    by = {(r["task"], r["budget"], r["seed"]): r for r in (*rows, new)}
    return [by[key] for key in sorted(by, key=lambda k: (order.index(k[0]), -k[1], k[2]))]


def _one_sequence(timings: list[dict[str, Any]]) -> float | None:
    """Milliseconds of one sequence on our kernels."""
    return next((round(t["milliseconds"], 1) for t in timings if (t["side"], t["batch"]) == ("kernels", 1)), None)


def show(result: dict[str, Any]) -> str:
    """The rows, then mean differences over tasks and seeds with their 95 % intervals."""
    lines = [json.dumps(result["environment"]), "scores on dev, percent; found minus others in points"]
    names = ("teacher", "found", "uniform", "random", "bag_of_words")
    head = "".join(f"{name:>14}" for name in names)
    lines.append(f"{'task':10}{'budget':>7}{'seed':>5}{head}{'-uniform':>10}{'-random':>9}{'-words':>8}{'minutes':>9}")
    for r in result["rows"]:
        scores = "".join(f"{100 * r['scores'][n]:14.2f}" if n in r["scores"] else f"{'-':>14}" for n in names)
        gaps = [100 * r["differences"][n]["value"] if n in r["differences"] else float("nan") for n in RIVALS[:3]]
        lines.append(
            f"{r['task']:10}{r['budget']:7g}{r['seed']:5}{scores}{gaps[0]:+10.2f}{gaps[1]:+9.2f}{gaps[2]:+8.2f}"
            f"{r['minutes']:9.1f}"
        )
    for r in result["rows"]:
        apart = ", ".join(f"{name} {value:.4f}" for name, value in r["divergence"].items())
        what = f"{r['task']} {r['budget']:g} seed {r['seed']}"
        lines.append(f"{what}: KL from the teacher {apart}; chosen: {r['chosen']}")
        for name, gap in r["differences"].items():
            low, high = 100 * gap["low"], 100 * gap["high"]
            lines.append(f"    found - {name} {100 * gap['value']:+.2f} ({low:+.2f} to {high:+.2f}, over rows of dev)")
        lines.append(f"    encoder parameters {r['encoder']}")
        lines.append(f"    milliseconds of one sequence {r['milliseconds']}")
    budgets = sorted({r["budget"] for r in result["rows"]})
    for name, chosen in [*((f"budget {b:g}", {b}) for b in budgets), ("all budgets", set(budgets))]:
        own = [r for r in result["rows"] if r["budget"] in chosen]
        for rival in RIVALS:
            values = [100 * r["differences"][rival]["value"] for r in own if rival in r["differences"]]
            if values:
                low, mean, high = interval(values)
                shown = f"{len(values)} runs"
                if len(values) >= FEW:
                    shown += f", 95 % interval {low:+.2f} to {high:+.2f}"
                lines.append(f"{name}: found - {rival}: {mean:+.2f} on average of {shown}")
    return "\n".join(lines)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % bootstrap interval over runs."""
    rng = np.random.default_rng(0)
    array = np.asarray(values)
    means = array[rng.integers(len(array), size=(10_000, len(array)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(array.mean()), float(high)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.found", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the tasks' files")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125], help="shares of the encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=None, help="where run directories go (the cache folder)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the last result and search nothing")
    parser.add_argument("options", nargs="*", help="behind --: further options of every search")
    args = parser.parse_args(argv)
    if args.show:
        if not args.out.is_file():
            parser.error(f"--show: no file {args.out}: measure it first, without --show")
        print(show(json.loads(args.out.read_text())))
        return 0
    runs = args.runs or cache_dir() / "benchmarks" / "found"
    rows = json.loads(args.out.read_text())["rows"] if args.out.is_file() else []
    for task in args.tasks:
        given = [*options(task, args.data), *args.options]
        for budget in args.budgets:
            for seed in args.seeds:
                rows = with_row(rows, row(task, budget, search(task, budget, seed, given, runs)))
                write_json_atomic(args.out, {"environment": describe(), "options": args.options, "rows": rows})
    print(show({"environment": describe(), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
