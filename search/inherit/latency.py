"""Milliseconds of every variant of a layer on this machine, and what the rest of the model takes.

Models of two layers of a variant are timed, in turns over many rounds, least times counted (whatever else runs on a
machine only adds to them); the cheapest one also with one layer, which tells what embeddings and head take. So is the
whole teacher. A student is expected to take the sum of its layers and the rest. Measured once per run, and kept in the
run directory: a resumed run solves the same problem.

Rejected: layers by themselves. A model's answer may be one call into C++ (`engine.student.fast_pass`), which takes less
than its layers called one by one; and one layer again and again finds its weights in the cache. Nor the rest as the
teacher's time without its layers' times: small students' weights stay in the cache, a teacher's do not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.architecture.architecture import Architecture, LayerSpec
from engine.files import write_json_atomic
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract
from search.context import Context, Prepared
from search.inherit.library import Library

FILE = "latency.json"
ROUNDS, ALONE = 15, 100
"""Rounds of many in turns, and of one student alone, which would else be over within one moment of the machine."""
SHORTEST = 2e-3
"""Seconds one timing takes at least; shorter passes are repeated within it."""


class Milliseconds(NamedTuple):
    """Of one pass.

    Attributes:
        variants: [V], a layer in each variant.
        rest: embeddings and head.
        whole: the teacher.
    """

    variants: np.ndarray
    rest: float
    whole: float


def layer_milliseconds(ctx: Context, library: Library) -> Milliseconds:
    """Measured, or read from the run directory."""
    path = ctx.rundir.path / "library" / FILE
    known = recorded(path, ctx)
    if known is not None:
        return known
    with ctx.timed("latency"), ctx.reporter.phase("latency of the layers", ROUNDS) as bar:
        times = measure(ctx, library, bar.update)
    path.parent.mkdir(exist_ok=True)
    write_json_atomic(path, {**times._asdict(), "variants": times.variants.tolist(), **conditions(ctx)})
    return times


def recorded(path: Path, ctx: Prepared) -> Milliseconds | None:
    """What `layer_milliseconds` wrote to `path`; None where there is nothing, not all, or of other conditions."""
    if not path.is_file():
        return None
    known = json.loads(path.read_text(encoding="utf-8"))
    if "whole" not in known or any(known.get(name) != value for name, value in conditions(ctx).items()):
        return None
    return Milliseconds(np.array(known["variants"], dtype=np.float64), float(known["rest"]), float(known["whole"]))


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
def measure(ctx: Prepared, library: Library, progress: Callable[[int], None] = lambda _done: None) -> Milliseconds:
    """Times everything, now; `progress` is told the rounds done, of `ROUNDS`."""
    at, model = conditions(ctx), library.model
    ids = torch.randint(0, model.config.vocab_size, (int(at["batch_size"]), int(at["sequence_length"])))
    ids = ids.to(ctx.device)
    specs = [spec for spec in library.variants.specs if not spec.skipped]
    pairs = [_repeated(model, spec, 2) for spec in specs]
    cheapest = min(range(len(specs)), key=lambda k: sum(p.numel() for p in pairs[k].parameters()))
    single = _repeated(model, specs[cheapest], 1)
    before = torch.get_num_threads()
    torch.set_num_threads(int(at["threads"]))
    try:
        timed = [*pairs, single, model]
        runs: list[Callable[[], Tensor]] = [lambda m=m: m(ids).logits for m in timed]  # type: ignore[misc]
        least = _least(runs, _clock(at), progress=progress)
    finally:
        torch.set_num_threads(before)
    *two, one, whole = least
    count = len(pairs[cheapest].base_model.encoder)  # 1 of a teacher that has no second layer
    rest = max(0.0, 2 * one - two[cheapest]) if count == 2 else 0.0
    layers = iter(max(0.0, t - rest) / count for t in two)
    return Milliseconds(np.array([0.0 if s.skipped else next(layers) for s in library.variants.specs]), rest, whole)


def _repeated(model: FFNASPreTrainedModel, spec: LayerSpec, count: int) -> FFNASPreTrainedModel:
    """The leading layers of `model`, `count` of them at most, in one variant."""
    skipped = LayerSpec(spec.expression, 0, spec.ratio, 0)
    layers = tuple(spec if k < count else skipped for k in range(len(model.base_model.encoder)))
    return extract(model, Architecture(layers)).eval()


def _clock(at: dict[str, int | str]) -> Callable[[], float]:
    """Seconds: of the processor where one thread of it does all the work, which other processes add nothing to."""
    alone = at["threads"] == 1 and at["device"] == "cpu"
    return time.thread_time if alone else time.perf_counter


def _least(
    runs: list[Callable[[], Tensor]],
    clock: Callable[[], float],
    rounds: int = ROUNDS,
    progress: Callable[[int], None] = lambda _done: None,
) -> list[float]:
    """Least milliseconds of each, in turns that change direction."""
    repeats = []
    for run in runs:
        run()
        began = clock()
        run()
        repeats.append(max(1, round(SHORTEST / max(1e-6, clock() - began))))
    least = [float("inf")] * len(runs)
    for turn in range(rounds):
        order = range(len(runs)) if turn % 2 == 0 else range(len(runs) - 1, -1, -1)
        for k in order:
            began = clock()
            for _ in range(repeats[k]):
                runs[k]()
            least[k] = min(least[k], 1e3 * (clock() - began) / repeats[k])
        progress(turn + 1)
    return least


def student_milliseconds(ctx: Prepared, model: FFNASPreTrainedModel) -> float:
    """Least milliseconds of a finished student under the same conditions."""
    at = conditions(ctx)
    ids = torch.randint(0, model.config.vocab_size, (int(at["batch_size"]), int(at["sequence_length"])))
    ids = ids.to(ctx.device)
    before = torch.get_num_threads()
    torch.set_num_threads(int(at["threads"]))
    try:
        with torch.no_grad():
            return _least([lambda: model(ids).logits], _clock(at), ALONE)[0]
    finally:
        torch.set_num_threads(before)
