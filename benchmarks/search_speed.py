"""A whole search on ffnas's kernels against the same search on plain PyTorch (`FFNAS_BACKEND=reference`).

    python -m benchmarks.search_speed [--preset smoke] [--rounds 3] [--seeds 0 1 2] [options such as --stage1.trials 8]

Runs alternate; each is a process of its own with an empty cache of teachers. Printed are medians of the wall time, of
the time spent in trials, and in how many rounds both found the same architecture.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BACKENDS = ("reference", "cpu")
TRIALS = ("stage1", "stage2", "stage3")


def run(preset: str, backend: str, folder: Path, options: list[str]) -> dict[str, object]:
    """Seconds in all and in trials, and the best architecture, of one search."""
    environment = {**os.environ, "FFNAS_BACKEND": backend}
    command = [sys.executable, "-m", "search.run", "--preset", preset, "--runs", str(folder), "--name", "run", *options]
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    phases = json.loads((folder / "run" / "phases.json").read_text())
    trials = sum(v for name, v in phases.items() if name.split()[0] in TRIALS)
    best = json.loads((folder / "run" / "best" / "architecture.json").read_text())
    return {"seconds": seconds, "trials": trials, "best": best["layers"], "phases": phases}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search_speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="smoke")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the rounds, in turn")
    args, options = parser.parse_known_args()
    results: dict[str, list[dict[str, object]]] = {b: [] for b in BACKENDS}
    for k in range(args.rounds):
        for backend in BACKENDS if k % 2 else reversed(BACKENDS):
            with tempfile.TemporaryDirectory() as folder:
                seeded = [*options, "--seed", str(args.seeds[k % len(args.seeds)])]
                results[backend].append(run(args.preset, backend, Path(folder), seeded))
    for field in ("seconds", "trials"):
        medians = {b: statistics.median(float(r[field]) for r in rows) for b, rows in results.items()}  # type: ignore[arg-type]
        speed = medians["reference"] / max(medians["cpu"], 1e-9)
        print(f"{field:8} reference {medians['reference']:.1f} s, cpu {medians['cpu']:.1f} s, ratio {speed:.2f}")
    same = sum(a["best"] == b["best"] for a, b in zip(results["reference"], results["cpu"], strict=True))
    print(f"same best architecture: in {same} of {args.rounds} rounds")


if __name__ == "__main__":
    main()
