"""The winners of the last round distilled in full, and the choice among them.

A student goes on from the weights it had at the end of the round. Which of its checkpoints is kept, and which student
is the found model, is decided by its mean KL divergence from the teacher on held-out rows: the selection split, then
the score and the selection split together. Accuracy on a few hundred rows moves in steps larger than what such students
differ by, and a log-likelihood also says how sure a teacher was of its mistakes, which is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from engine.architecture.architecture import Architecture
from engine.data import EncodedDataset, EncodedTask
from engine.distill.inherited import divergence
from engine.evaluation.evaluation import evaluate, evaluate_dev, predict_rows
from engine.teacher.settings import capped_steps
from engine.training.checkpoint import load_weights
from engine.training.settings import PhaseSettings
from search.context import Context
from search.derive import BestWeights, Derived
from search.inherit.last_round import weights_of
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

    def finish(self, name: str, group: str, architecture: Architecture) -> Derived:
        """Distils the winner of a group in full.

        Args:
            name: of the finished student, for phases and folders.
            group: of the last round, whose weights it starts from.
            architecture: the winner's.
        """
        ctx, settings = self.ctx, self.ctx.config.inherit
        total = steps_of(ctx, ctx.data.train)
        phase = PhaseSettings(steps=total, batch_size=settings.batch_size, lr=settings.lr)
        distiller = ctx.distiller()
        targets = ctx.targets(ORDER, need_logits=True, plan=batch_plan(ctx, ctx.data.train, phase, ORDER))
        table = self.tables.choose(architecture)
        start = self.library.assemble(architecture)
        load_weights(weights_of(ctx, group), start)
        model, data = self.tables.student(start, table), self.tables.data(table)
        judge = self._closeness(data)
        best = BestWeights(ctx, model, max(1, round(total / settings.evaluations)), judge)
        folder = ctx.rundir.checkpoints / name
        folder.mkdir(exist_ok=True)
        train_phase(
            ctx,
            f"{name} task",
            model,
            data.train,
            phase,
            lambda batch, step: distiller.task_loss(
                model, batch, targets=targets.get(step, self.tables.original(batch, table))
            ),
            folder / "task.safetensors",
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
        return lambda model: -float(self._apart(model, data.select, self._wanted[1]).mean())

    def _held_out(self, model: nn.Module, data: EncodedTask) -> float:
        """Minus the mean divergence from the teacher over the rows of the score and the selection split."""
        score, select = self._wanted
        parts = [self._apart(model, data.score, score), self._apart(model, data.select, select)]
        return -float(torch.cat(parts).mean())

    def _apart(self, model: nn.Module, data: EncodedDataset, wanted: np.ndarray) -> torch.Tensor:
        """Divergence from the teacher's answers, per row."""
        own = torch.from_numpy(predict_rows(model, data, precision=self.ctx.precision))
        return divergence(own, torch.from_numpy(wanted), regression=self.ctx.spec.is_regression)
