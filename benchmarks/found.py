"""The found architecture against the hand-designed GELU student and the winner of random search, over seeds.

    python -m benchmarks.found --task demo                                   three searches, about 10 minutes a seed
    python -m benchmarks.found --task sst2 --train train.csv --dev dev.csv   SST-2 from files with sentence and label
    python -m benchmarks.found --task demo --show                            prints the last result

A search (`OPTIONS`) trains both baselines with the found model's recipe, on the same batches: the GELU student has the
found one's parameter count (within 0.5 %), random search evaluates as many candidates, each by the same short
distillation. Reported is the dev split, which nothing is chosen on. Another seed cuts other splits from the training
data and has its own teacher. Searches run on one thread; an interrupted one goes on.
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

RESULTS = Path(__file__).parent / "results"
OPTIONS = (
    *("--preset", "demo", "--device", "cpu", "--precision", "fp32", "--teacher_precision", "fp32", "--threads", "1"),
    *("--tensorboard", "false", "--student.hidden_size", "144", "--finetune.max_steps", "80"),
    *("--data.score_fraction", "0.04", "--data.select_fraction", "0.03", "--data.max_held_out", "1500"),
    *("--stage1.trials", "16", "--stage1.startup", "8", "--stage1.population", "4", "--stage1.task.steps", "40"),
    *("--stage2.trials", "12", "--stage2.startup", "4", "--stage2.population", "4", "--stage2.task.steps", "40"),
    *("--stage3.trials", "12", "--stage3.startup", "6", "--stage3.task.steps", "150"),
    *("--derive.task.steps", "300", "--derive.evaluations", "6"),
)
SIDES = {"found": "found", "gelu": "hand-designed GELU", "random": "random search"}


def search(task: str, data: Sequence[str], seed: int) -> dict[str, Any]:
    """The summary of one search; a finished one is not repeated."""
    runs = cache_dir() / "benchmarks" / "found"
    run = runs / f"{task}-{seed}"
    if not (run / "summary.json").is_file():
        where = ["--runs", str(runs), "--name", run.name, "--seed", str(seed)]
        arguments = ["--resume", str(run)] if (run / "config.yaml").is_file() else [*OPTIONS, *data, *where]
        subprocess.run([sys.executable, "-m", "search.run", *arguments], check=True, stdout=sys.stderr)
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def row(summary: dict[str, Any]) -> dict[str, Any]:
    """What of a summary is compared."""
    models = {"found": summary["best"], **summary["baselines"]}
    return {
        "seed": summary["seed"],
        "dev rows": summary["task"]["rows"]["dev"],
        "trials": summary["trials"],
        "seconds": round(sum(summary["seconds"].values())),
        "teacher": summary["teacher"]["metric"]["value"],
        "models": {
            name: {
                "dev": models[name]["metric"]["value"],
                "select": models[name]["metrics"]["select"][models[name]["metric"]["name"]],
                "params": models[name]["params"],
                "architecture": models[name]["architecture"],
            }
            for name in SIDES
        },
    }


def show(result: dict[str, Any]) -> str:
    rows = result["seeds"]
    what = f"{result['task']}: {result['metric']} on {rows[0]['dev rows']} dev examples"
    head = f"{'seed':6}{'teacher':>9}" + "".join(f"{label:>20}" for label in SIDES.values())
    lines = [
        json.dumps(result["environment"]),
        f"{what}, percent; found minus others in points",
        f"{head}{'-GELU':>9}{'-random':>9}",
    ]
    table = []
    for r in rows:
        dev = {name: 100 * r["models"][name]["dev"] for name in SIDES}
        ahead = [dev["found"] - dev["gelu"], dev["found"] - dev["random"]]
        cells = [f"{dev[name]:.2f} ({r['models'][name]['params'] / 1e6:.3f} M)" for name in SIDES]
        lines.append(
            f"{r['seed']:<6}{100 * r['teacher']:9.2f}"
            + "".join(f"{c:>20}" for c in cells)
            + "".join(f"{a:+9.2f}" for a in ahead)
        )
        table.append([100 * r["teacher"], *dev.values(), *ahead])
    mean = np.mean(table, axis=0)
    lines.append(
        f"{'mean':6}{mean[0]:9.2f}"
        + "".join(f"{m:>20.2f}" for m in mean[1:-2])
        + "".join(f"{m:+9.2f}" for m in mean[-2:])
    )
    for r in rows:
        lines += [f"seed {r['seed']}, {label}: {r['models'][name]['architecture']}" for name, label in SIDES.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.found", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, help="names the result; demo needs no files")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--show", action="store_true", help="print the last result and search nothing")
    args = parser.parse_args(argv)
    out = RESULTS / f"found-{args.task}.json"
    if not args.show:
        if args.train is None and args.task != "demo":
            parser.error("--train, --dev: give the files of the task")
        dev = ("--data.dev", str(args.dev)) if args.dev else ("--data.dev_fraction", "0.04")
        data = (*(("--data.train", str(args.train)) if args.train else ()), *dev)
        summaries = [search(args.task, data, seed) for seed in args.seeds]
        metric = summaries[0]["best"]["metric"]["name"]
        result = {"environment": describe(), "task": args.task, "metric": metric, "options": [*OPTIONS, *dev[:1]]}
        write_json_atomic(out, {**result, "seeds": [row(s) for s in summaries]})
    elif not out.is_file():
        parser.error(f"--show: no file {out}: measure it first, without --show")
    print(show(json.loads(out.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
