"""What is measured of the FFN op besides its table: grouped launches, never-seen expressions, repeated bits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from benchmarks.cold import random_text
from benchmarks.ffn_cases import DTYPES, RELEASED, Case, inputs
from benchmarks.gpu.records import Records, refusal
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import OURS, graphed, interleaved, setting
from kernels import ExpressionError, fused_ffn
from kernels.call import FFNCall
from kernels.ffn.grouped import GroupMember, fused_ffn_grouped
from kernels.ffn.ops import fused_ffn_stack
from kernels.language.lowering import lower

MEMBERS = 8


def run(records: Records, scale: Scale, out: Path) -> None:
    del out
    tokens, count = (8, 1) if scale.rehearses else (scale.few, 60)
    stacks = 2 if scale.rehearses else MEMBERS
    common = (scale.dtype, scale.hidden, scale.widths, stacks, tokens, scale.device, scale.rounds)
    records.case("grouped", lambda: grouped(*common))
    width = scale.widths[1]
    records.case("never seen", lambda: never_seen(scale.hidden, width, scale.tokens, scale.dtype, scale.device, count))
    base = scale.case(RELEASED[0], scale.widths[0], True)
    records.case("repeated", lambda: {"bits": repeated(base)})
    if not scale.rehearses:
        records.case("repeated, many tokens", lambda: {"bits": repeated(replace(base, tokens=scale.many))})


def members(widths: tuple[int, ...], count: int = MEMBERS) -> list[tuple[str, int, int]]:
    """(expression, width, depth) of stacks that differ in all three."""
    return [(RELEASED[k % len(RELEASED)], widths[k // 2 % len(widths)], 1 + k % 4) for k in range(count)]


def _members(hidden: int, widths: tuple[int, ...], count: int, dtype: torch.dtype, device: str) -> list[GroupMember]:
    """The stacks of `members` with random parameters."""
    g = torch.Generator().manual_seed(0)

    def parameter(scale: float, *shape: int, offset: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=g) * scale + offset).to(device, dtype).requires_grad_()

    found = []
    for text, d, n in members(widths, count):
        groups = [
            [parameter(hidden**-0.5, d, hidden) for _ in range(n)],
            [parameter(0.02, d) for _ in range(n)],
            [parameter(d**-0.5, hidden, d) for _ in range(n)],
            [parameter(0.02, hidden) for _ in range(n)],
        ]
        norm = [[parameter(0.1, hidden, offset=1.0) for _ in range(n)], [parameter(0.02, hidden) for _ in range(n)]]
        found.append(GroupMember(*groups, text, *norm))
    return found


def grouped(
    dtype: str, hidden: int, widths: tuple[int, ...], count: int, tokens: int, device: str, rounds: int
) -> dict[str, object]:
    """Seconds of `count` mixed stacks in one call and in as many, forward and forward + backward."""
    stacks = _members(hidden, widths, count, DTYPES[dtype], device)
    xs = [torch.randn(tokens, hidden, device=device).to(DTYPES[dtype]) for _ in stacks]
    weights = [torch.ones_like(x) for x in xs]
    leaves = [t for m in stacks for t in m.parameters]

    def alone() -> list[Tensor]:
        return [
            fused_ffn_stack(x, m.w1, m.b1, m.w2, m.b2, m.ln_weight, m.ln_bias, m.program)
            for x, m in zip(xs, stacks, strict=True)
        ]

    def trained(forward: Callable[[], list[Tensor]]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(forward(), leaves, weights)

    result: dict[str, object] = {"dtype": dtype, "tokens": tokens, "members": len(stacks)}
    for direction, wrap in (("forward", torch.no_grad()), ("forward + backward", trained)):
        graphs, refused = {}, {}
        runs = {"one launch": ("cuda stack", lambda: fused_ffn_grouped(xs, stacks))}
        runs |= {f"a call each, {name}": (name, alone) for name in OURS}
        for name, (own, run) in runs.items():
            try:
                with setting(own):
                    graphs[name] = graphed(wrap(run), own, device)
            except Exception as error:  # part of the result
                refused[name] = refusal(error)
        result[direction] = {"seconds": interleaved(graphs, rounds, device), "refused": refused}
    return result


def never_seen(hidden: int, inner: int, tokens: int, dtype: str, device: str, count: int) -> dict[str, object]:
    """Milliseconds from an expression's text to its result, and what was compiled meanwhile, after a warm start."""
    from kernels.triton.ahead import compile_ahead
    from kernels.triton.launch import statistics as launches

    case = Case(RELEASED[0], dtype, inner, tokens, False, hidden, device)
    x, w1, b1, w2, b2, *norm = inputs(case)
    rng, seen = Random(1), set()
    if device == "cuda":
        program = lower(RELEASED[0])
        groups = ([w1], [b1], [w2], [b2], [norm[0]], [norm[1]])
        call = FFNCall(x, *groups, program.tensor, int(program.flags), 0.0, None, 1e-12, x.dtype)
        compile_ahead(call, training=False)

    def first_result() -> float | None:
        text = random_text(rng)
        if text in seen:
            return None
        seen.add(text)
        start = time.perf_counter()
        try:
            fused_ffn(x, w1, b1, w2, b2, *norm, text)
        except ExpressionError:
            return None  # not valid at these widths: the space would not propose it
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with setting("triton interpreter"), torch.no_grad():
        for _ in range(count):  # kernels are loaded onto the device at their first launch
            first_result()
        before = launches.compilations
        times = [t for t in (first_result() for _ in range(3 * count)) if t is not None]
    times.sort()
    return {
        "expressions": len(times), "median_ms": 1e3 * statistics.median(times), "worst_ms": 1e3 * times[-1],
        "p95_ms": 1e3 * times[int(0.95 * len(times))], "compilations": launches.compilations - before,
    }  # fmt: skip


def repeated(case: Case) -> dict[str, str]:
    """Per side of ours "same bits", "different bits", or why it could not run: two runs of forward and backward."""
    found = {}
    for name in OURS:
        try:
            with setting(name):
                results = []
                for _ in range(2):
                    tensors = inputs(case)
                    out = fused_ffn(*tensors, case.expression)
                    results.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
            same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            found[name] = "same bits" if same else "different bits"
        except Exception as error:  # part of the result
            found[name] = refusal(error)
    return found
