"""Measuring a latency table: whole models of random architectures, timed in turn, and the costs that explain them.

All architectures run in one model whose stacks of FFNs are exchanged, so that hundreds need the memory of a few. They
are timed round after round in changing order, until another round changes little; the least time counts. One CPU thread
is timed by its processor time, everything else by the wall clock. Costs are the non-negative least squares of the
relative errors; a model without FFNs tells what is fixed. Why so: docs/decisions/0016.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape, inner_width
from engine.autocast import autocast
from engine.errors import UserError
from engine.latency.table import SEGMENTS, Check, Conditions, LatencyTable, program_class, segment_widths
from engine.student.ffn import FFNPlan, FFNStack
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import build_student
from kernels import readable
from kernels.language.lowering import lower

ROUNDS = 7, 80
"""Least and largest number of times every architecture is timed."""
SECONDS = 120.0
"""No round beyond the least number begins later than this."""
SETTLED = 0.001
"""Timing ends when the last `PATIENCE` rounds have made the least times shorter by less than this share."""
PATIENCE = 5
SHORTEST = 2e-3
"""Seconds a timing takes at least; shorter passes are repeated within it."""

Progress = Callable[[int, int], None]
"""Called with rounds done and to do."""


class Clock:
    """Times architectures of one student in one model.

    Args:
        shape, heads, policy: the student.
        at: conditions; `threads` are set while timing.
        stacks, ratios: what layers may have.
    """

    def __init__(
        self,
        shape: ModelShape,
        heads: int,
        policy: str,
        at: Conditions,
        stacks: Sequence[int],
        ratios: Sequence[Fraction],
    ) -> None:
        length = at.sequence_length
        if length > shape.max_positions:
            raise UserError(f"sequence_length: {length} is more than the student's {shape.max_positions} positions")
        self.shape, self.heads, self.policy, self.at = shape, heads, policy, at
        self.stacks, self.ratios = tuple(stacks), tuple(ratios)
        self.device = torch.device(at.device)
        made: FFNASPreTrainedModel = build_student(shape, None, heads, policy=policy, seed=0)
        model = made.base_model
        gelu = model.planner.full[0]
        self.banks = [
            {
                r: FFNStack(model.config, FFNPlan(gelu.program, max(stacks), inner_width(r, shape.ffn_size)))
                for r in ratios
            }
            for _ in range(shape.num_layers)
        ]
        for bank in self.banks:
            for stack in bank.values():
                stack.eval().to(self.device)
        self.model = model.eval().to(self.device)
        self.ids, self.mask = _inputs(shape.vocab_size, at)
        with torch.inference_mode():
            self.seconds()  # kernels that are built at first use are built now

    def use(self, arch: Architecture | None) -> None:
        """Puts an architecture into the model; None: no FFNs at all.

        Raises:
            UserError: a layer has fewer heads, or no FFN.
        """
        base = self.model
        if arch is not None and any(s.heads not in (None, self.heads) or s.stack == 0 for s in arch.layers):
            raise UserError("latency table: is measured on layers with all heads and an FFN; give such architectures")
        for index, layer in enumerate(base.encoder):
            if arch is None:
                layer.all_ffn = _Nothing()
                continue
            spec = arch.layers[index]
            layer.all_ffn = self.banks[index][spec.ratio]
        if arch is not None:
            size = self.shape.ffn_size
            base.planner.full = tuple(
                FFNPlan(lower(s.expression, self.policy), s.stack, inner_width(s.ratio, size)) for s in arch.layers
            )

    def seconds(self, passes: int = 1) -> float:
        """Seconds of one forward pass of what is in the model, the mean of `passes`."""
        return _seconds(self.model, self.ids, self.mask, self.at, passes)

    def least(
        self,
        archs: Sequence[Architecture | None],
        *,
        rounds: tuple[int, int] = ROUNDS,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> list[float]:
        """Least milliseconds of each, timed in turn in changing order for `rounds` (at least, at most) rounds."""
        rng = np.random.default_rng(seed)
        best = np.full(len(archs), np.inf)
        totals: list[float] = []
        began = time.monotonic()
        with steady(self.at.threads), torch.inference_mode(), autocast(self.device, self.at.precision):
            passes = []
            for arch in archs:  # the first pass of an architecture prepares things later ones do not
                self.use(arch)
                self.seconds()
                passes.append(max(1, round(SHORTEST / max(self.seconds(), 1e-6))))
            for done in range(1, rounds[1] + 1):
                for index in rng.permutation(len(archs)):
                    self.use(archs[index])
                    best[index] = min(best[index], self.seconds(passes[index]))
                totals.append(float(best.sum()))
                settled = len(totals) > PATIENCE and totals[-1] > (1 - SETTLED) * totals[-1 - PATIENCE]
                if progress is not None:
                    progress(done, rounds[1])
                if done >= rounds[0] and (settled or time.monotonic() - began > SECONDS):
                    break
        return [1e3 * float(t) for t in best]


@readable.register
class _Nothing(nn.Module):
    """In place of a layer's FFNs."""

    def forward(self, x: Tensor, plan: FFNPlan) -> Tensor:
        return x


@contextmanager
def steady(threads: int) -> Iterator[None]:
    """So many threads, and no garbage collection, while the block runs."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def model_milliseconds(model: FFNASPreTrainedModel, at: Conditions, *, rounds: tuple[int, int] = ROUNDS) -> float:
    """Least milliseconds of a forward pass of a finished model's encoder, by the clock and the inputs of a table."""
    device = torch.device(at.device)
    model = model.base_model.eval().to(device)
    ids, mask = _inputs(model.config.vocab_size, at)
    best: list[float] = []
    with steady(at.threads), torch.inference_mode(), autocast(device, at.precision):
        _seconds(model, ids, mask, at)
        passes = max(1, round(SHORTEST / max(_seconds(model, ids, mask, at), 1e-6)))
        for done in range(1, 3 * rounds[1] + 1):
            best.append(min(_seconds(model, ids, mask, at, passes), best[-1] if best else math.inf))
            recent = best[-1 - 3 * PATIENCE] if len(best) > 3 * PATIENCE else math.inf
            if done >= 3 * rounds[0] and best[-1] > (1 - SETTLED) * recent:
                break
    return 1e3 * best[-1]


def _inputs(vocab_size: int, at: Conditions) -> tuple[Tensor, Tensor]:
    """Random token ids and a mask of real tokens, [B, S]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocab_size, (at.batch_size, at.sequence_length), generator=generator).to(at.device)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _seconds(model: nn.Module, ids: Tensor, mask: Tensor, at: Conditions, passes: int = 1) -> float:
    now = time.thread_time if at.device == "cpu" and at.threads == 1 else time.perf_counter
    began = now()
    for _ in range(passes):
        model(ids, attention_mask=mask)
    if at.device != "cpu":
        torch.cuda.synchronize()
    return (now() - began) / passes


def build_table(
    clock: Clock,
    training: Sequence[Architecture],
    check: Sequence[Architecture],
    *,
    rounds: tuple[int, int] = ROUNDS,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measures a table of the clock's student and checks it.

    Args:
        clock: times the student's architectures.
        training: architectures the costs are found from; every ratio and operator must occur in them.
        check: other architectures, whose predictions are compared with measurement.
        rounds: times every architecture is timed, at least and at most.
        progress: called after every round.
    """
    measured = clock.least([None, *training, *check], rounds=rounds, progress=progress)
    known, held_out = measured[: len(training) + 1], measured[len(training) + 1 :]
    student = clock.shape, clock.heads, clock.policy, clock.stacks, clock.ratios, clock.at
    table = fit_costs(*student, [None, *training], known)
    predicted = [table.predict(arch) for arch in check]
    return replace(table, check=Check.of(predicted, held_out))


def fit_costs(
    shape: ModelShape,
    heads: int,
    policy: str,
    stacks: tuple[int, ...],
    ratios: tuple[Fraction, ...],
    at: Conditions,
    archs: Sequence[Architecture | None],
    milliseconds: Sequence[float],
) -> LatencyTable:
    """The costs that explain measured latencies best; None stands for a model without FFNs."""
    from scipy.optimize import nnls  # deferred: half a second of import

    classes = {
        layer.expression: program_class(layer.expression, policy)
        for arch in archs
        if arch is not None
        for layer in arch.layers
    }
    names = sorted({operator for kind in classes.values() for _, operator, _ in kind.operators})
    columns = ["fixed", "call", *ratios, "parallel", *SEGMENTS, *names]
    place = {column: index for index, column in enumerate(columns)}
    rows = np.zeros((len(archs), len(columns)))
    rows[:, place["fixed"]] = 1
    for row, arch in zip(rows, archs, strict=True):
        for layer in arch.layers if arch is not None else ():
            kind, widths = classes[layer.expression], segment_widths(shape, layer.ratio)
            row[place["call"]] += 1
            row[place[layer.ratio]] += layer.stack
            row[place["parallel"]] += layer.stack * kind.parallel
            for segment in kind.segments:
                row[place[segment]] += layer.stack * widths[segment]
            for segment, operator, count in kind.operators:
                row[place[operator]] += layer.stack * count * widths[segment]
    target = np.asarray(milliseconds)
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1
    found = nnls(rows / scale / target[:, None], np.ones(len(target)))[0] / scale
    cost = dict(zip(columns, map(float, found), strict=True))
    return LatencyTable(
        shape=shape,
        heads=heads,
        policy=policy,
        conditions=at,
        fixed=cost["fixed"],
        layers={(n, r): cost["call"] + n * cost[r] for n in stacks for r in ratios},
        parallel=cost["parallel"],
        segments={name: cost[name] for name in SEGMENTS},
        operators={name: cost[name] for name in names},
        measured=len(archs),
    )
