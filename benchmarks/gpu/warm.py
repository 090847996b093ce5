"""Compiles what the other families need on all processors, before anything is timed.

Triton compiles a kernel in about a second, at its first launch and on one processor: minutes for both tiers of all
cases; torch.compile takes some 10 s a case. The same, compiled by processes beside each other, is found in the caches
on disk at the first launch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.ffn_cases import COMPILE_MODES, DTYPES, RELEASED, Case, runner
from benchmarks.gpu import launches
from benchmarks.gpu.checks import members
from benchmarks.gpu.records import Line, Records, reason
from benchmarks.gpu.scale import DEVICE, Scale
from kernels import lower, parse_expression
from kernels.call import FFNCall
from kernels.compile_check import units
from kernels.compile_check.call import Call
from kernels.compile_check.calls import ffn_call
from kernels.language.program import Program

Task = tuple[str, "units.Unit | Case"]
"""("unit", a kernel), or a side of torch.compile and a case."""


def calls(cases: Sequence[Case]) -> list[Call]:
    """The calls of both tiers, over meta tensors."""
    from kernels.triton.microcode import SLOT_VARIANTS

    return _with_slots(cases, (0, SLOT_VARIANTS[0]))


def tiered(cases: Sequence[Case]) -> list[Call]:
    """The calls of all of `benchmarks.gpu.launches.TIERS`."""
    from kernels.triton.microcode import SLOT_VARIANTS

    return _with_slots(cases, (0, *SLOT_VARIANTS[:2]))


def _with_slots(cases: Sequence[Case], variants: Sequence[int]) -> list[Call]:
    found = []
    for case in cases:
        program = lower(parse_expression(case.expression))
        made = json.dumps(_recipe(case, program, [True] * 7))
        found += [ffn_call("case", program.words, made, slots=slots) for slots in variants]
    return list(dict.fromkeys(found))


def any_expression(case: Case) -> list[Call]:
    """The forward calls of a shape that between them launch every interpreting kernel an expression can need."""
    from kernels.triton.ahead import programs
    from kernels.triton.microcode import SLOT_VARIANTS

    allowed = [p for p in programs() if p.rule.allows(case.hidden, case.inner)]
    return [
        Call("forward", _forward, (program.words, json.dumps(_recipe(case, program, None)), slots))
        for program in allowed
        for slots in SLOT_VARIANTS
    ]


def _forward(words: tuple[int, ...], recipe: str, slots: int) -> None:
    from kernels.triton.recipe import run_recipe

    run_recipe(words, json.loads(recipe), generated=False, slots=slots)


def _recipe(case: Case, program: Program, needs: list[bool] | None) -> dict[str, object] | None:
    from kernels.triton.recipe import recipe

    h, d = case.hidden, case.inner
    shapes = ((case.tokens, h), (d, h), (d,), (h, d), (h,), (h,), (h,))
    x, *rest = (torch.empty(s, dtype=DTYPES[case.dtype], device="meta") for s in shapes)
    dtype = DTYPES[case.autocast or case.dtype]
    call = FFNCall(x, *([t] for t in rest), program.tensor, int(program.flags), 0.0, None, 1e-12, dtype)
    return recipe(call, needs is not None, needs)


def run(records: Records, scale: Scale, out: Path) -> None:
    """The family `compile`: everything the other families launch, on all processors."""
    del out
    for name, todo in tasks(scale).items():
        records.case(name, lambda todo=todo: ahead(todo))


def tasks(scale: Scale) -> dict[str, list[Task]]:
    """What is compiled, by kind; a few kernels of each in a rehearsal, for sm_90."""
    if scale.rehearses:
        units_of = [units.triton_units(list(made)[:2], [90])[-1:] for made in _calls(DEVICE)]
        return {"kernels": [("unit", unit) for some in units_of for unit in some]}
    major, minor = torch.cuda.get_device_capability()
    first, unseen, sweep = (
        [("unit", unit) for unit in units.triton_units(list(made), [10 * major + minor])] for made in _calls(scale)
    )
    names = [name for name in COMPILE_MODES if scale.full or name == "compile"]
    compiled: list[Task] = [(name, case) for case in scale.ffn() for name in names]
    return {"kernels": first, "never-seen expressions": unseen, "torch.compile": compiled, "tile candidates": sweep}


def _calls(scale: Scale) -> list[Iterable[Call]]:
    """Calls of the cases and of grouped stacks; of never-seen expressions; of every candidate of the tile sweep."""
    first = scale.case(RELEASED[0], scale.widths[0], True)
    stacks = [replace(first, expression=text, inner=width) for text, width, _ in members(scale.widths)]
    unseen = replace(first, inner=scale.widths[1])
    cases = [*scale.ffn(), *scale.exact(), *scale.shapes(), *stacks]
    return [calls(list(dict.fromkeys(cases))), any_expression(unseen), launches.sweep_calls(scale, tiered)]


def ahead(todo: Sequence[Task], processes: int = 0) -> Line:
    """Does the tasks in processes beside each other; how many could be done."""
    # spawned: a forked process would inherit a CUDA context
    count = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(min(count, max(1, len(todo))), mp_context=get_context("spawn")) as workers:
        reasons = [reason for reason in workers.map(_done, todo) if reason]
    return {"asked": len(todo), "failed": len(reasons), "reasons": sorted(set(reasons))[:10]}


def _done(task: Task) -> str:
    """Why a task could not be done, or ""."""
    name, what = task
    try:
        if isinstance(what, units.Unit):
            units.build(what)
        else:  # PyTorch keeps compiled graphs on disk
            runner(what, name)()
    except Exception as error:  # whatever it is, the launch will say it again where it counts
        return reason(error)
    return ""
