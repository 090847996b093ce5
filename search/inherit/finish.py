"""The winners of the last round distilled in full, and the choice among them.

A student goes on from the weights it had at the end of the round. Which of its checkpoints is kept, and which student
is the found model, is decided by its mean KL divergence from the teacher on held-out rows: the selection split, then
the score and the selection split together. Accuracy on a few hundred rows moves in steps larger than what such students
differ by, and a log-likelihood also says how sure a teacher was of its mistakes, which is the same for all of them.
"""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from engine.architecture.architecture import Architecture
from engine.data import Batch, EncodedDataset, EncodedTask
from engine.evaluation.evaluation import evaluate, evaluate_dev, predict_rows
from engine.objective import KDLoss
from engine.teacher.settings import capped_steps
from engine.training.checkpoint import sound_weights
from engine.training.settings import PhaseSettings
from search.console.pace import Costs
from search.console.progress import Bar, Reporter, silent
from search.context import Context
from search.derive import BestWeights, Derived
from search.inherit.last_round import STAGE as ROUND
from search.inherit.last_round import Entrant, load_best, remove_round, train_again, weights_of
from search.inherit.library import Library
from search.inherit.total import Tables
from search.phases import batch_plan, train_phase

ORDER = "inherit finish"
"""Finished students see the same batches in the same order."""

LEAST_STEPS, MOST_STEPS, PASSES = 300, 900, 3
"""Bounds of the rule for the number of steps, and passes over the rows between them."""


def steps_of(ctx: Context, data: EncodedDataset) -> int:
    """Optimizer steps of the full distillation: as configured, or by the number of rows and their length.

    The rule is three passes, at least 300 steps and at most 900: small sets gain from passes, large ones from rows.
    """
    settings = ctx.config.inherit
    if settings.steps is not None:
        return settings.steps
    steps = int(min(MOST_STEPS, max(LEAST_STEPS, PASSES * data.num_batches(settings.batch_size))))
    row_tokens = len(data.tokens) / max(1, len(data))
    return max(LEAST_STEPS, capped_steps(steps, settings.max_tokens, settings.batch_size, row_tokens))


@dataclass(frozen=True)
class Winner:
    """A student to distil in full.

    Attributes:
        name: of the finished student, for phases and folders.
        group: of the last round, whose weights it starts from.
        architecture: its layers.
    """

    name: str
    group: str
    architecture: Architecture


class Stopped(Exception):
    """Ends the training of a student beside which another one failed, or which the user interrupted."""


@dataclass
class Finisher:
    """Distils students in full.

    Attributes:
        ctx: the run.
        library: what students are made of.
        tables: their token tables.
    """

    ctx: Context
    library: Library
    tables: Tables
    _teacher: threading.Lock = field(default_factory=threading.Lock)
    _stop: threading.Event = field(default_factory=threading.Event)

    def finish_all(self, winners: Sequence[Winner], entrants: Sequence[Entrant]) -> list[Derived]:
        """Distils the winners in full, on the CPU side by side; `entrants` are those of the round they come from.

        A thin student's step has products too small to keep two threads busy, so each student has a thread (with more
        threads than students, an equal share of them), and whoever comes first to a batch asks the teacher for all.
        How many threads a student has does not depend on who else is still at work: same settings, same result.
        """
        ctx = self.ctx
        self._restore(winners, entrants)
        finished = self._side_by_side(winners)
        remove_round(ctx, [winner.group for winner in winners])
        return finished

    def _restore(self, winners: Sequence[Winner], entrants: Sequence[Entrant]) -> None:
        """Sees to it that students which are not finished have the weights they start from."""
        ctx = self.ctx
        lost = [w.group for w in winners if not self._is_finished(w) and not sound_weights(weights_of(ctx, w.group))]
        if lost:
            ctx.reporter.info(f"weights of the last round are lost or damaged ({', '.join(lost)}): trained again")
            train_again(ctx, self.library, entrants, ctx.ledger.trials(ROUND))

    def _result(self, winner: Winner) -> Path:
        """Weights of the student distilled in full."""
        return self.ctx.rundir.checkpoints / winner.name / "task.safetensors"

    def _is_finished(self, winner: Winner) -> bool:
        return sound_weights(self._result(winner))

    def _side_by_side(self, winners: Sequence[Winner]) -> list[Derived]:
        ctx = self.ctx
        _ = ctx.distiller(), ctx.sentinel  # made once, before several ask for them
        threads = torch.get_num_threads()
        steps = steps_of(ctx, ctx.data.train) * len(winners)
        with ctx.timed("full distillation"), ctx.reporter.phase("full distillation", steps) as bar:
            shared = _SharedBar(bar)
            views = [shared.view(ctx) for _ in winners]
            if ctx.device.type != "cpu" or threads == 1:
                return [self._finish(view, winner) for view, winner in zip(views, winners, strict=True)]
            share = max(1, threads // len(winners))
            try:
                with ThreadPoolExecutor(len(winners), "ffnas-finish", torch.set_num_threads, (share,)) as pool:
                    futures = [
                        pool.submit(contextvars.copy_context().run, self._finish, view, winner)
                        for view, winner in zip(views, winners, strict=True)
                    ]
                    return self._results(futures)
            finally:
                torch.set_num_threads(threads)  # a worker's call also reached libraries' global settings

    def _results(self, futures: Sequence[Future[Derived]]) -> list[Derived]:
        """Waits for all; where one fails, or the user interrupts, the others end at their next step."""
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            self._stop.set()
            raise
        failed = [e for f in futures if f.done() and (e := f.exception()) is not None]
        if failed:
            self._stop.set()
            raise failed[0]
        return [future.result() for future in futures]

    def _finish(self, ctx: Context, winner: Winner) -> Derived:
        """Distils one student; `ctx` is the run as this student's phase sees it."""
        settings, architecture = ctx.config.inherit, winner.architecture
        total = steps_of(ctx, ctx.data.train)
        phase = PhaseSettings(steps=total, batch_size=settings.batch_size, lr=settings.lr)
        distiller = ctx.distiller()
        with self._teacher:  # what is made once for all
            targets = self.ctx.targets(ORDER, need_logits=True, plan=batch_plan(ctx, ctx.data.train, phase, ORDER))
            table = self.tables.choose(architecture)
            start = self.library.assemble(architecture)
            if not self._is_finished(winner):
                load_best(ctx, winner.group, start)
            model, data = self.tables.student(start, table), self.tables.data(table)
            judge = self._closeness(data)
        best = BestWeights(ctx, model, max(1, round(total / settings.evaluations)), judge)
        self._result(winner).parent.mkdir(exist_ok=True)

        def loss(batch: Batch, step: int) -> KDLoss:
            if self._stop.is_set():
                raise Stopped
            with self._teacher:
                wanted = targets.get(step, self.tables.original(batch, table))
            return distiller.task_loss(model, batch, targets=wanted)

        train_phase(
            ctx,
            f"{winner.name} task",
            model,
            data.train,
            phase,
            loss,
            self._result(winner),
            order=ORDER,
            after_step=best.after_step,
            extra_state=best.state,
            restore_extra=best.restore,
            finish=best.finish,
        )
        model.requires_grad_(True).eval()  # as users expect it
        rows: list[np.ndarray] = []
        dev = evaluate_dev(model, data, precision=ctx.precision, keep=rows.append)
        return Derived(
            model=model,
            architecture=architecture,
            params=self.tables.total(architecture, table),
            select=evaluate(model, data.select, ctx.score_spec, precision=ctx.precision),
            dev=dev,
            rows=rows[0],
            tokenizer=self.tables.tokenizer_of(table),
            choice=self._held_out(model, data),
        )

    @cached_property
    def _wanted(self) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's answers to the score and the selection split, [N, C] in the order of their rows."""
        model, precision = self.ctx.teacher.model, self.ctx.config.teacher_precision
        score, select = (
            predict_rows(model, d, precision=precision) for d in (self.ctx.data.score, self.ctx.data.select)
        )
        return score, select

    def _closeness(self, data: EncodedTask) -> Callable[[nn.Module], float]:
        """Minus the mean divergence from the teacher on the selection split, as `BestWeights` wants it."""
        wanted = self._wanted[1]
        return lambda model: -float(self._apart(model, data.select, wanted).mean())

    def _held_out(self, model: nn.Module, data: EncodedTask) -> float:
        """Minus the mean divergence from the teacher over the rows of the score and the selection split."""
        score, select = self._wanted
        parts = [self._apart(model, data.score, score), self._apart(model, data.select, select)]
        return -float(torch.cat(parts).mean())

    def _apart(self, model: nn.Module, data: EncodedDataset, wanted: np.ndarray) -> torch.Tensor:
        """Divergence from the teacher's answers, per row."""
        own = torch.from_numpy(predict_rows(model, data, precision=self.ctx.precision))
        return self.ctx.spec.head.divergence(own, torch.from_numpy(wanted))


class _SharedBar:
    """One bar for phases that run at the same time."""

    def __init__(self, bar: Bar) -> None:
        self.bar = bar
        self._done: list[int] = []
        self._notes: list[str] = []
        self._lock = threading.Lock()

    def view(self, ctx: Context) -> Context:
        """The run as one of the phases sees it: its progress goes into the bar, its time is counted by the whole."""
        own = copy.copy(ctx)
        own.counts_time = False
        own.reporter = _Part(self, len(self._done))
        self._done.append(0)
        self._notes.append("")
        return own

    def update(self, part: int, done: int, note: str) -> None:
        """Takes the progress of one phase."""
        with self._lock:
            self._done[part], self._notes[part] = done, note
            self.bar.update(sum(self._done), "; ".join(filter(None, self._notes)))


class _Part(Reporter):
    """The reporter of one of those phases."""

    def __init__(self, shared: _SharedBar, number: int) -> None:
        super().__init__(silent().console)
        self.shared, self.number = shared, number

    @contextmanager
    def phase(
        self, name: str, total: int, *, costs: Costs | None = None, most: bool = False, limit: float | None = None
    ) -> Iterator[Bar]:
        yield _PartBar(self, name)


@dataclass
class _PartBar:
    part: _Part
    name: str

    def update(
        self, done: int, note: str = "", total: int | None = None, failures: Mapping[str, int] | None = None
    ) -> None:
        self.part.shared.update(self.part.number, done, f"{self.name.removesuffix(' task')} {note}")
