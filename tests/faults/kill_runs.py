"""Kills searches at random instants and compares what they end with, once resumed, with an undisturbed search.

    python tests/faults/kill_runs.py --kills 100

Instants are stratified: the k-th of n kills falls into the k-th n-th of the undisturbed run's time, so that every
phase, derivation and export included, is hit. Every tenth run draws the report's figures.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from fault_runs import Nursery, make_inputs, options, outcome, unfinished_files


def kill_and_resume(
    nursery: Nursery, folder: Path, name: str, instant: float, expected: dict, *, plots: bool = False
) -> str | None:
    """One kill at `instant` seconds; None if the resumed run equals `expected`, else what is wrong."""
    run, cache = folder / "runs" / name, folder / f"cache-{name}"
    killed = nursery.run(options(folder, folder / "runs", name), cache, kill_after=instant, plots=plots)
    if killed.code not in (-signal.SIGKILL, 0):
        return f"killed at {instant:.2f} s: ended with {killed.code}: {killed.err[-500:]}"
    if run.exists() and (bad := unfinished_files(run)):
        return f"killed at {instant:.2f} s: unfinished files under final names: {bad}"
    argv = ["--resume", str(run)] if (run / "config.yaml").exists() else options(folder, folder / "runs", name)
    resumed = nursery.run(argv, cache, plots=plots)
    if resumed.code:
        return f"killed at {instant:.2f} s: resuming ended with {resumed.code}: {resumed.err[-1000:]}"
    if outcome(run) != expected:
        return f"killed at {instant:.2f} s: the resumed run ended otherwise than the undisturbed one"
    if left := [str(p) for p in run.rglob(".*") if ".tmp" in p.name]:
        return f"killed at {instant:.2f} s: temporary files stayed: {left}"
    shutil.rmtree(run)
    shutil.rmtree(cache)
    return None


def kills(nursery: Nursery, folder: Path, count: int, seed: int, report: bool = False) -> list[str]:
    """`count` kills; what went wrong, one line each."""
    calm = nursery.run(options(folder, folder / "runs", "calm"), folder / "cache-calm")
    assert calm.code == 0, calm.err
    expected = outcome(folder / "runs" / "calm")
    rng, problems = random.Random(seed), []
    for number in range(count):
        instant = (number + rng.random()) / count * calm.seconds
        plots = number % 10 == 9
        problem = kill_and_resume(
            nursery, folder, f"kill{number}", instant * (2 if plots else 1), expected, plots=plots
        )
        problems += [problem] if problem else []
        if report and (number + 1) % 10 == 0:
            print(f"{number + 1} kills, {len(problems)} problems", flush=True)
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ffnas-kills-") as folder, Nursery() as nursery:
        make_inputs(Path(folder))
        problems = kills(nursery, Path(folder), arguments.kills, arguments.seed, report=True)
    print(*problems, f"{arguments.kills} kills, {arguments.kills - len(problems)} resumed runs equal", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
