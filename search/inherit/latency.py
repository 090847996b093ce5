"""Milliseconds of every variant of a layer on this machine, and what the rest of the model takes.

Variants are timed one layer each, in turns over many rounds, least times counted (whatever else runs on a machine only
adds to them). The rest is the whole teacher's time without its layers' times, so that the sum of a student's layers and
the rest is what the student is expected to take. Measured once per run, and kept in the run directory: a resumed run
solves the same problem.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.files import write_json_atomic
from engine.student.attention import extended_mask
from search.context import Context, Prepared
from search.inherit.library import Library

FILE = "latency.json"
ROUNDS = 15
SHORTEST = 2e-3
"""Seconds one timing takes at least; shorter passes are repeated within it."""


def layer_milliseconds(ctx: Context, library: Library) -> tuple[np.ndarray, float]:
    """Milliseconds [V] of a layer in each variant, and of everything else; measured, or read from the run directory."""
    path = ctx.rundir.path / "library" / FILE
    known = recorded(path, ctx)
    if known is not None:
        return known
    with ctx.timed("latency"):
        times, rest = measure(ctx, library)
    path.parent.mkdir(exist_ok=True)
    write_json_atomic(path, {"variants": times.tolist(), "rest": rest, **conditions(ctx)})
    return times, rest


def recorded(path: Path, ctx: Prepared) -> tuple[np.ndarray, float] | None:
    """What `layer_milliseconds` wrote to `path`; None where there is nothing, or of other conditions."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    if any(known.get(name) != value for name, value in conditions(ctx).items()):
        return None
    return np.array(known["variants"], dtype=np.float64), float(known["rest"])


def conditions(ctx: Prepared) -> dict[str, int | str]:
    """What is timed: one pass over so many full sequences."""
    chosen = ctx.config.objectives
    length = chosen.sequence_length or ctx.config.data.max_length
    return {
        "batch_size": chosen.batch_size,
        "sequence_length": length,
        "threads": chosen.threads,
        "device": str(ctx.device),
    }


@torch.no_grad()
def measure(ctx: Prepared, library: Library) -> tuple[np.ndarray, float]:
    """Milliseconds [V] per variant, and of the rest."""
    at, base = conditions(ctx), library.model.base_model
    ids = torch.randint(0, base.config.vocab_size, (int(at["batch_size"]), int(at["sequence_length"])))
    ids = ids.to(ctx.device)
    x = base.embeddings(ids)
    mask = extended_mask(base.config, x, torch.ones_like(ids, dtype=torch.bool))
    blocks = [library.block(0, spec) for spec in library.variants.specs]
    runs: list[Callable[[], Tensor]] = [lambda block=block: block(x, mask) for block in blocks]  # type: ignore[misc]
    runs.append(lambda: library.model(ids).logits)
    before = torch.get_num_threads()
    torch.set_num_threads(int(at["threads"]))
    try:
        least = _least(runs, _clock(at))
    finally:
        torch.set_num_threads(before)
    times = np.array(least[:-1])
    times[-1] = 0.0  # the skipped layer
    rest = max(0.0, least[-1] - library.variants.shape.num_layers * times[0])
    return times, rest


def _clock(at: dict[str, int | str]) -> Callable[[], float]:
    """Seconds: of the processor where one thread of it does all the work, which other processes add nothing to."""
    alone = at["threads"] == 1 and at["device"] == "cpu"
    return time.thread_time if alone else time.perf_counter


def _least(runs: list[Callable[[], Tensor]], clock: Callable[[], float]) -> list[float]:
    """Least milliseconds of each, in turns that change direction."""
    repeats = []
    for run in runs:
        run()
        began = clock()
        run()
        repeats.append(max(1, round(SHORTEST / max(1e-6, clock() - began))))
    least = [float("inf")] * len(runs)
    for turn in range(ROUNDS):
        order = range(len(runs)) if turn % 2 == 0 else range(len(runs) - 1, -1, -1)
        for k in order:
            began = clock()
            for _ in range(repeats[k]):
                runs[k]()
            least[k] = min(least[k], 1e3 * (clock() - began) / repeats[k])
    return least


def student_milliseconds(ctx: Prepared, model: torch.nn.Module) -> float:
    """Least milliseconds of a finished student under the same conditions."""
    at = conditions(ctx)
    ids = torch.randint(0, model.config.vocab_size, (int(at["batch_size"]), int(at["sequence_length"])))
    ids = ids.to(ctx.device)
    before = torch.get_num_threads()
    torch.set_num_threads(int(at["threads"]))
    try:
        with torch.no_grad():
            return _least([lambda: model(ids).logits], _clock(at))[0]
    finally:
        torch.set_num_threads(before)
