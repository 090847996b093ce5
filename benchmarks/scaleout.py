"""`python -m benchmarks.scaleout`: trials per hour of two ranks against one, each rank on a core of its own.

Stage 1 of the demo with more candidates, nothing trained before it, so that all runs start from the same weights and
must find the same trials with the same scores; that is checked. Runs alternate (1, 2, 2, 1, ...); a run's rate is that
of its stage 1, from the first proposal to the last score. Linux only: processes are bound to cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OPTIONS = (
    *("--preset", "demo", "--device", "cpu", "--precision", "fp32", "--teacher_precision", "fp32", "--threads", "1"),
    *("--warmup.steps", "0", "--stage1.population", "4", "--stage1.startup", "8", "--sampler.concurrent", "2"),
    *("--stage2.trials", "1", "--stage2.task.steps", "1", "--stage3.trials", "1", "--derive.evaluations", "1"),
    *("--stage3.text.steps", "0", "--stage3.task.steps", "0", "--derive.text.steps", "0", "--derive.task.steps", "1"),
    *("--baselines.gelu", "false", "--baselines.random", "false", "--tracker", "none"),
)


def search(ranks: int, trials: int, steps: int, folder: Path) -> tuple[float, list[dict[str, str]]]:
    """Seconds of stage 1, and its trials."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "search.run"]
    size = ("--stage1.trials", str(trials), "--stage1.task.steps", str(steps))
    place = ("--runs", str(folder), "--name", f"run{len(list(folder.iterdir()))}")
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    subprocess.run(
        [sys.executable, *launcher, *OPTIONS, *size, *place],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run = folder / place[-1]
    with (run / "stage1" / "candidates.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return json.loads((run / "phases.json").read_text())["stage1 candidates"], rows


def main() -> None:
    """Prints one line per run and the ratio of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20, help="of each trial's distillation")
    parser.add_argument("--repeats", type=int, default=2, help="runs of either kind")
    options = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("benchmarks.scaleout: needs two cores")
    rates: dict[int, list[float]] = {1: [], 2: []}
    first: list[dict[str, str]] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for ranks in ([1, 2, 2, 1] * options.repeats)[: 2 * options.repeats]:
            seconds, rows = search(ranks, options.trials, options.steps, Path(folder))
            first = first or rows
            rates[ranks].append(options.trials / seconds * 3600)
            same = "same trials and scores" if rows == first else "OTHER TRIALS OR SCORES"
            print(f"{ranks} rank{'s' * (ranks > 1)}: {rates[ranks][-1]:.0f} trials per hour, {same}", flush=True)
    one, two = (statistics.median(rates[n]) for n in (1, 2))
    print(f"median {one:.0f} and {two:.0f} trials per hour: {two / one:.2f} times as many with two ranks")


if __name__ == "__main__":
    main()
