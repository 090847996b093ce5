"""Derive: the found architecture becomes a model, distilled on text and then on the task.

The checkpoint is chosen on the `select` split, compared a fixed number of times over the task phase; the `dev` split
is evaluated once, at the end, and never chosen on. The baselines go through the same function: they see the same
batches in the same order, and share the teacher's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.data.dataset import join
from engine.evaluation.evaluation import evaluate, evaluate_dev
from engine.evaluation.metrics import primary
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract
from engine.training.checkpoint import remove_weights, untrained
from engine.training.settings import PhaseSettings
from search.context import Context
from search.phases import batch_plan, phase_data, read_back, train_phase


@dataclass
class Derived:
    """A finished model and its metrics.

    Attributes:
        model: standalone, on the run's device, in eval mode.
        architecture: of the model.
        params: with fit_dense, as budgeted.
        select: metrics on the split the checkpoint was chosen on.
        dev: metrics on the reported split.
        choice: what it is chosen by among finished models, higher is better; not every strategy chooses among them.
        rows: what `dev` was measured on, see `engine.evaluation.evaluation.evaluate_dev`.
        tokenizer: the model's own, None where it is the teacher's.
    """

    model: FFNASPreTrainedModel
    architecture: Architecture
    params: int
    select: dict[str, float]
    dev: dict[str, float]
    rows: np.ndarray | None = None
    choice: float = 0.0
    tokenizer: Any | None = None

    @property
    def measured_rows(self) -> np.ndarray:
        """`rows` of a student that was evaluated."""
        assert self.rows is not None
        return self.rows


class BestWeights:
    """Keeps the weights with the best score on the selection split; ties keep the earlier ones.

    Args:
        ctx: the run.
        model: whose weights.
        every: optimizer steps between comparisons.
        judge: what it is compared by, higher is better; None for the task's metric on the selection split.
    """

    def __init__(
        self,
        ctx: Context,
        model: FFNASPreTrainedModel,
        every: int,
        judge: Callable[[FFNASPreTrainedModel], float] | None = None,
    ) -> None:
        self.ctx, self.model, self.every = ctx, model, max(1, every)
        self.judge = judge or self._metric
        self.score = -float("inf")
        self.weights: dict[str, Tensor] = {}

    def after_step(self, done: int) -> None:
        """Evaluates when it is time to."""
        if done % self.every == 0:
            self.consider()

    def consider(self) -> None:
        """Evaluates now and keeps a copy of the weights if they are the best so far."""
        score = self.judge(self.model)
        if score > self.score:
            self.score, same = score, untrained(self.model)
            self.weights = {n: t.detach().clone() for n, t in self.model.state_dict().items() if n not in same}

    def _metric(self, model: FFNASPreTrainedModel) -> float:
        return primary(
            self.ctx.spec, evaluate(model, self.ctx.data.select, self.ctx.spec, precision=self.ctx.precision)
        )[1]

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint inside the phase."""
        return {"score": torch.tensor(self.score, dtype=torch.float64), **self.weights}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state` returned."""
        self.weights = dict(state)
        self.score = float(self.weights.pop("score"))

    def finish(self) -> None:
        """Puts the best weights back into the model (the present ones, if nothing was compared)."""
        if self.weights:
            self.model.load_state_dict({**self.model.state_dict(), **self.weights})


def derive(
    ctx: Context, name: str, source: FFNASPreTrainedModel, architecture: Architecture, *, extra_text_steps: int = 0
) -> Derived:
    """Distils `architecture` from `source`'s sliced weights and evaluates it.

    Args:
        ctx: the run.
        name: of the derivation, for logs and seeds.
        source: the warmed-up supernet that gives the first weights.
        architecture: what to derive.
        extra_text_steps: further text steps, for models whose source had fewer than the found one's.
    """
    folder = ctx.rundir.checkpoints / name
    folder.mkdir(exist_ok=True)
    model = extract(source, architecture, fit_dense=True)
    if not read_back(ctx, f"{name} task", model, folder / "task.safetensors"):
        _distil(ctx, name, model, folder, extra_text_steps)
    if ctx.config.files == "models":
        ctx.ranks.first(lambda: remove_weights(folder / "text.safetensors"))  # the task's weights came out of them
    rows: list[np.ndarray] = []
    dev = evaluate_dev(model, ctx.data, precision=ctx.precision, keep=rows.append)
    return Derived(
        model=model,
        architecture=architecture,
        params=ctx.space.parameters(architecture),
        select=evaluate(model, ctx.data.select, ctx.spec, precision=ctx.precision),
        dev=dev,
        rows=rows[0],
    )


def _distil(ctx: Context, name: str, model: FFNASPreTrainedModel, folder: Path, extra_text_steps: int) -> None:
    """Distils `model` on text and then on the task."""
    distiller, text_distiller = ctx.distiller(), ctx.distiller("text")
    settings, train = ctx.config.derive, ctx.data.train
    if settings.score_rows:
        train = join((train, ctx.data.score))
    text_plan = batch_plan(ctx, ctx.data.text, settings.text, "derive text")
    task_plan = batch_plan(ctx, train, settings.task, "derive task")
    text_targets = ctx.targets("derive text", need_logits=False, plan=text_plan)
    task_targets = ctx.targets("derive task", need_logits=True, plan=task_plan)
    text = settings.text
    if extra_text_steps:
        text = with_extra_steps(text, text_steps(ctx, text, "derive text"), extra_text_steps)
    train_phase(
        ctx,
        f"{name} text",
        model,
        ctx.data.text,
        text,
        lambda batch, step: text_distiller.text_loss(model, batch, targets=text_targets.get(step, batch)),
        folder / "text.safetensors",
        order="derive text",
    )
    data = phase_data(ctx, train, settings.task, "derive task")
    total = settings.task.total_steps(data.num_batches(settings.task.batch_size))
    best = BestWeights(ctx, model, round(total / settings.evaluations))
    train_phase(
        ctx,
        f"{name} task",
        model,
        train,
        settings.task,
        lambda batch, step: distiller.task_loss(model, batch, targets=task_targets.get(step, batch)),
        folder / "task.safetensors",
        order="derive task",
        after_step=best.after_step,
        extra_state=best.state,
        restore_extra=best.restore,
        finish=best.finish,
    )


def text_steps(ctx: Context, settings: PhaseSettings, name: str) -> int:
    """Optimizer steps of a text phase over this run's text."""
    data = phase_data(ctx, ctx.data.text, settings, name)
    return settings.total_steps(data.num_batches(settings.batch_size))


def with_extra_steps(settings: PhaseSettings, steps: int, extra: int) -> PhaseSettings:
    """`settings` prolonged from `steps` to `steps + extra` optimizer steps."""
    return PhaseSettings(**{**settings.__dict__, "steps": steps + extra, "epochs": None})
