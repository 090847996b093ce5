"""Thousands of trials in one process: memory, file handles, threads, processes and time per trial must stay the same.

    python tests/faults/long_run.py --trials 5000

The trial loop, the sampler, the search space, the ledger with its copy and the kernels are the real ones; training is
left out: a candidate is scored by one forward and backward pass of its first FFN.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape, inner_width
from kernels import fused_ffn
from search.console.progress import silent
from search.ledger.copy import open_ledger
from search.ledger.ledger import Trial
from search.samplers import make_sampler
from search.scoring.trials import Result, run_trials
from search.space import SearchSpace

HIDDEN = 24
TIMED = 200
"""Trials before a reading whose time is taken."""


def resident() -> int:
    """Bytes of this process in memory, after everything that can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def usage() -> dict[str, int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return {
        "bytes": resident(),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "children": len(children.read_text().split()) if children.exists() else 0,
    }


def evaluate(architectures: Sequence[Architecture], peers: Sequence[Trial] = ()) -> list[Result]:
    results = []
    for architecture in architectures:
        layer = architecture.layers[0]
        inner = inner_width(layer.ratio, HIDDEN)
        shapes = [(8, HIDDEN), (inner, HIDDEN), (inner,), (HIDDEN, inner), (HIDDEN,), (HIDDEN,), (HIDDEN,)]
        tensors = [torch.randn(s, generator=torch.Generator().manual_seed(1)).requires_grad_() for s in shapes]
        out = fused_ffn(*tensors, layer.expression)
        out.square().mean().backward()
        results.append(Result(float(tensors[0].grad.abs().mean().clamp(0, 1e6)), seconds=0.01))
    return results


def run(trials: int, first: int, sampler: str = "random") -> tuple[dict[str, float], dict[str, float]]:
    """Usage after `first` and after `trials` trials; `milliseconds` is the CPU time of one of the `TIMED` before."""
    shape = ModelShape(HIDDEN, 3, HIDDEN, vocab_size=50, embedding_size=8, teacher_hidden_size=16)
    space = SearchSpace.from_config(shape)
    seen: list[dict[str, float]] = []

    began = 0.0

    def on_trial(trial: Trial) -> None:
        nonlocal began
        if trial.number + 1 in (first - TIMED, trials - TIMED):
            began = time.process_time()
        if trial.number + 1 in (first, trials):
            milliseconds = (time.process_time() - began) / TIMED * 1000
            seen.append({**usage(), "milliseconds": milliseconds})

    with tempfile.TemporaryDirectory(prefix="ffnas-long-") as folder, ExitStack() as stack:
        ledger = open_ledger(Path(folder) / "study.db", stack, print)
        made = make_sampler(sampler, space, 0, initial=[])
        run_trials("stage1", trials, made, space, evaluate, ledger, silent(), on_trial=on_trial)
        seen[-1]["ledger"] = (Path(folder) / "study.db").stat().st_size
    return seen[0], seen[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5000)
    parser.add_argument("--first", type=int, default=500)
    parser.add_argument("--sampler", default="random")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    before, after = run(arguments.trials, arguments.first, arguments.sampler)
    ratio = after["bytes"] / before["bytes"]
    print(f"after {arguments.first}: {before}\nafter {arguments.trials}: {after}")
    print(f"resident memory {ratio:.3f} times; {time.monotonic() - began:.0f} s")
    flat = all(after[k] <= before[k] for k in ("handles", "threads", "children"))
    return 0 if flat and ratio <= 1.05 else 1


if __name__ == "__main__":
    sys.exit(main())
