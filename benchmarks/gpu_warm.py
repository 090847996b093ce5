"""Compiles what the GPU benchmark's cases need on all processors, before anything is timed.

Triton compiles a kernel in about a second, at its first launch and on one processor: minutes for both tiers of all
cases. The same kernels, compiled by processes beside each other, are found in Triton's cache on disk at that launch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from benchmarks.ffn_cases import DTYPES, Case
from kernels import lower, parse_expression
from kernels.call import FFNCall
from kernels.compile_check import units
from kernels.compile_check.call import Call
from kernels.compile_check.calls import ffn_call
from kernels.language.program import Program


def calls(cases: Sequence[Case]) -> list[Call]:
    """The calls of both tiers, over meta tensors."""
    from kernels.triton.microcode import SLOT_VARIANTS

    found = []
    for case in cases:
        program = lower(parse_expression(case.expression))
        made = json.dumps(_recipe(case, program, [True] * 7))
        found += [ffn_call("case", program.words, made, slots=slots) for slots in (0, SLOT_VARIANTS[0])]
    return list(dict.fromkeys(found))


def any_expression(case: Case) -> list[Call]:
    """The forward calls of a shape that between them launch every interpreting kernel an expression can need."""
    from kernels.triton.microcode import SLOT_VARIANTS
    from kernels.triton.prepare import programs

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
    call = FFNCall(x, *([t] for t in rest), program.tensor, int(program.flags), 0.0, None, 1e-12, x.dtype)
    return recipe(call, needs is not None, needs)


def compile_ahead(todo_of: Sequence[Call], arch: int, processes: int = 0) -> int:
    """Compiles the kernels of the calls for sm_`arch` into Triton's cache; how many could be."""
    todo = units.triton_units(todo_of, [arch])
    # spawned: a forked process would inherit a CUDA context
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as workers:
        return sum(workers.map(_compiled, todo))


def _compiled(unit: units.Unit) -> bool:
    try:
        units.build(unit)
    except Exception:  # whatever it is, the launch will say it again where it counts
        return False
    return True
