"""Proxy training: the short distillation that scores a candidate of stages 1 and 2 (and of the random baseline).

Every candidate starts from the supernet's sliced weights and sees the same batches in the same order, so the
teacher's answers are computed once per stage (`engine.distill.TeacherTargets`) and differences between scores are
differences between candidates.
"""

from __future__ import annotations

from torch import nn

from engine.architecture import Architecture
from engine.data import EncodedDataset
from engine.distill import TeacherTargets
from engine.evaluation import evaluate
from engine.metrics import primary
from engine.seeding import seed_everything
from engine.settings import PhaseSettings
from engine.supernet import extract
from engine.training import cycle, run_phase
from search.config import StageConfig
from search.context import Context
from search.phases import phase_data


class ProxyTrainer:
    """Scores candidates by a short distillation from a warmed-up supernet.

    Args:
        ctx: the run.
        name: of the stage; seeds the data order.
        settings: the stage's proxy settings.
        supernet: gives candidates their first weights.
    """

    def __init__(self, ctx: Context, name: str, settings: StageConfig, supernet: nn.Module) -> None:
        self.ctx = ctx
        self.name = name
        self.settings = settings
        self.supernet = supernet
        self.distiller = ctx.distiller()
        self.text = phase_data(ctx, ctx.data.text, settings.text, "proxy-text")
        self.task = phase_data(ctx, ctx.data.train, settings.task, "proxy-task")
        self.text_targets = TeacherTargets(self.distiller, need_logits=False)
        self.task_targets = TeacherTargets(self.distiller, need_logits=True)

    def __call__(self, architecture: Architecture) -> float:
        """Trains `architecture` shortly and returns the task's primary metric on the score split."""
        ctx = self.ctx
        seed_everything(ctx.seed(self.name, ctx.space.key(architecture)))
        model = extract(self.supernet, architecture, fit_dense=True)
        self._run(model, "text", self.text, self.settings.text, self.text_targets)
        self._run(model, "task", self.task, self.settings.task, self.task_targets)
        metrics = evaluate(model, ctx.data.score, ctx.spec, precision=ctx.precision)
        return primary(ctx.spec, metrics)[1]

    def _run(
        self, model: nn.Module, part: str, data: EncodedDataset, settings: PhaseSettings, targets: TeacherTargets
    ) -> None:
        seed = self.ctx.seed("proxy", part)
        loss = self.distiller.text_loss if part == "text" else self.distiller.task_loss
        run_phase(
            f"{self.name} {part}",
            model,
            lambda start: cycle(data, settings.batch_size, seed=seed, start_step=start),
            lambda batch, step: loss(model, batch, targets=targets.get(step, batch)),
            settings,
            settings.total_steps(data.num_batches(settings.batch_size)),
        )
