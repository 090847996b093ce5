"""Times of single kernels, and the sweep over tile sizes whose result is package data (`kernels.triton.tuning`).

A kernel is taken from the driver's own sequence of launches and repeated in a CUDA graph, so that neither the host nor
its neighbours count. The sweep does that with every candidate of a kernel's family; the fastest by the geometric mean
over the shapes of the family is written to `tiles.json`. Put that file into kernels/triton/tiles/ as sm_90.json (the
name says the architecture), and it is used from then on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from benchmarks.ffn_cases import Case, inputs
from benchmarks.gpu.records import Line, Records, ended, read, reason
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import graphed, seconds, setting
from kernels import lower, parse_expression
from kernels.call import FFNCall
from kernels.compile_check.call import Call
from kernels.triton import ffn, tuning
from kernels.triton.device_program import DeviceProgram
from kernels.triton.launch import Launch, watched
from kernels.triton.recipe import run_recipe
from kernels.triton.specialize import program_of

TIERS = {
    "interpreter": ("triton interpreter", 0),
    "population": ("triton interpreter", 6),
    "specialized": ("triton specialized", 0),
}
"""Tier -> side whose setting it has, and slots its kernels have at least: captured population steps have 6."""
TILES = "tiles.json"
_REPEATS = 20
"""Launches of one kernel in a graph: together longer than the host needs for a replay."""


def passes(case: Case, slots: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward that saves, backward with every gradient) of a case, on Triton's kernels, without autograd.

    Called in the setting of a tier; `slots` as of `TIERS`.
    """
    x, *rest = (t.detach() for t in inputs(case))
    program = lower(parse_expression(case.expression))
    call = FFNCall(x, *([t] for t in rest), program.tensor, int(program.flags), 0.0, None, 1e-12, x.dtype)
    needs = [True] * 7
    own = program_of(call, True)
    if slots:
        own = DeviceProgram(own.words, own.code, tuple(max(slots, n) for n in own.slots))
    _, saved = ffn.forward(call, True, own)
    grad = torch.randn_like(x)
    return lambda: ffn.forward(call, True, own), lambda: ffn.backward(call, grad, saved, needs, own)


def kernels(records: Records, scale: Scale, out: Path) -> None:
    """The family `kernels`: microseconds of every launch of six shapes, both tiers."""
    del out
    for case in scale.shapes():
        for tier in TIERS:
            records.case(f"{tier} {case}", lambda case=case, tier=tier: _timed(case, tier, scale))


def _timed(case: Case, tier: str, scale: Scale) -> Line:
    found: Line = {"tokens": case.tokens, "hidden": case.hidden, "inner": case.inner, "tier": tier}
    side, slots = TIERS[tier]
    with setting(side):
        for name, run in zip(("forward", "backward"), passes(case, slots), strict=True):
            found[name] = [[_label(launch), round(1e6 * time_of(launch.run, scale), 2)] for launch in watched(run)]
    return found


def _label(launch: Launch) -> str:
    c = launch.constants
    blocks = "x".join(str(c[k]) for k in ("BM", "BN", "BK", "ROWS", "FIRST", "SECOND", "BP") if k in c)
    return f"{launch.kernel.__name__} {blocks} {c.get('SLOTS', 0)} slots {launch.warps} warps grid {launch.grid}"


def time_of(run: Callable[[], object], scale: Scale) -> float:
    """Seconds of one launch within a graph of many."""
    repeats, replays = (1, 1) if scale.rehearses else (_REPEATS, 3)
    replay = graphed(lambda: [run() for _ in range(repeats)], "eager", scale.device)
    return min(seconds(replay, replays, scale.device) for _ in range(replays)) / (repeats * replays)


def tiles(records: Records, scale: Scale, out: Path) -> None:
    """The family `tiles`: every candidate of every family of the benchmark's shapes; `tiles.json` after each case."""
    for case in scale.shapes():
        for tier in TIERS:
            records.case(f"{tier} {case}", lambda case=case, tier=tier: _swept(case, tier, scale))
            write_tiles(records.path, out / TILES, scale)


def _swept(case: Case, tier: str, scale: Scale) -> Line:
    """Microseconds by family and configuration of one shape's products."""
    found: dict[str, dict[str, float | str]] = {}

    def choose(of: tuning.Family, run: Callable[[tuning.Gemm], object]) -> tuning.Gemm:
        times = found.setdefault(of.key(), {})
        for config in tuning.candidates(of):
            label = json.dumps(list(config))
            try:
                took = round(1e6 * time_of(lambda config=config: run(config), scale), 2)
            except Exception as error:  # a configuration that cannot run is out
                times[label] = reason(error)
                torch.ones(1, device=scale.device).item()  # an error that stays ends the case here
                continue
            before = times.get(label, 0.0)
            times[label] = took + (before if isinstance(before, float) else 0.0)
        return tuning.shipped(of)

    side, slots = TIERS[tier]
    with setting(side):
        forward, backward = passes(case, slots)
        with tuning.sweeping(choose):
            forward()
            backward()
    return {"families": found}


def write_tiles(results: Path, target: Path, scale: Scale) -> None:
    """The fastest configuration of every family swept so far: by the geometric mean over the shapes that all ran in."""
    seen: dict[str, list[dict[str, float]]] = {}
    for line in ended(read(results), "tiles"):
        for key, times in line.get("families", {}).items():
            seen.setdefault(key, []).append({k: v for k, v in times.items() if isinstance(v, float) and v > 0})
    best = {}
    for key, shapes in seen.items():
        common = set.intersection(*(set(times) for times in shapes))
        if common:
            label = min(common, key=lambda k: sum(math.log(times[k]) for times in shapes))
            best[key] = tuning.Gemm(*json.loads(label))
    origin: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__, "device": "a rehearsal"}
    if not scale.rehearses:
        major, minor = torch.cuda.get_device_capability()
        origin |= {"device": torch.cuda.get_device_name(), "architecture": f"sm_{10 * major + minor}"}
    target.write_text(tuning.tiles_file(best, **origin), encoding="utf-8")


def sweep_calls(scale: Scale, calls_of: Callable[[list[Case]], list[Call]]) -> Iterator[Call]:
    """The calls of the benchmark's shapes, made to launch every candidate: what is compiled ahead of a sweep."""
    for call in calls_of(scale.shapes()):
        yield Call(call.name, candidates_of, call.arguments)


def candidates_of(words: tuple[int, ...], recipe: str, slots: int, saves_only: bool) -> None:
    """Launches a recipe's call with every candidate, where launches are compiled or recorded."""
    del saves_only
    made = json.loads(recipe)

    def choose(of: tuning.Family, run: Callable[[tuning.Gemm], object]) -> tuning.Gemm:
        for config in tuning.candidates(of):
            run(config)
        return tuning.shipped(of)

    with tuning.sweeping(choose):
        for one in ({**made, "needs": None}, made):
            run_recipe(words, one, generated=not slots, slots=slots)
