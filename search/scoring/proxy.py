"""Proxy training: the short distillation that scores candidates of stages 1 and 2 (and of the random baseline).

Every candidate starts from the supernet's sliced weights and sees the same batches in the same order, so differences
between scores are differences between candidates. They are trained as populations against shared teacher passes
(`engine.distill.population`); the teacher's answers are also kept from one population to the next while they fit, and
from stage 1 for stage 2 where both train on the same batches. Candidates have the embeddings of the tokens they will
meet only (`engine.student.vocabulary`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

from engine.architecture.architecture import Architecture
from engine.data import Batch, EncodedDataset
from engine.distill import Distiller, Member, Outcome, TeacherTargets, train_population
from engine.distill.population import Part, generator_state, side_by_side
from engine.distill.room import free_bytes, students_at_once
from engine.evaluation.evaluation import evaluate
from engine.evaluation.metrics import primary
from engine.seeding import seed_everything
from engine.states import EncoderStates
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import extract
from engine.student.vocabulary import WORTHWHILE, Vocabulary, of_first_batches
from engine.training.loop import cycle
from engine.training.sentinel import Sentinel
from engine.training.settings import PhaseSettings
from search.config.schema import StageConfig
from search.context import Context
from search.ledger.ledger import Trial
from search.phases import PhaseData, phase_data
from search.scoring.halving import SuccessiveHalving, attributes
from search.scoring.trials import Result

STOPPED = "stopped after"
"""How the reason of a candidate stopped at a rung begins."""


class ProxyTrainer:
    """Scores candidates by a short distillation from a warmed-up supernet.

    Args:
        ctx: the run.
        name: of the stage; seeds the data order.
        settings: the stage's proxy settings.
        supernet: gives candidates their first weights.
    """

    def __init__(self, ctx: Context, name: str, settings: StageConfig, supernet: FFNASPreTrainedModel) -> None:
        self.ctx = ctx
        self.name = name
        self.settings = settings
        self.supernet = supernet
        self.distillers: dict[Part, Distiller] = {
            "task": ctx.distiller(stage=True),
            "text": ctx.distiller("text", stage=True),
        }
        self.sentinel = ctx.sentinel
        self.text: PhaseData = phase_data(ctx, ctx.data.text, settings.text, "proxy-text")
        self.task: PhaseData = phase_data(ctx, ctx.data.train, settings.task, "proxy-task")
        self.score_data = ctx.data.score.last(settings.score_share)
        self.text_targets = self._targets("text", settings.text)
        self.task_targets = self._targets("task", settings.task)
        self.total_steps = settings.task.total_steps(self.task.num_batches(settings.task.batch_size))
        self.vocabulary = self._vocabulary()
        if self.vocabulary is not None:
            both = [cast("EncodedDataset", data) for data in (self.text, self.task)]  # as `_vocabulary` has seen
            self.text, self.task, self.score_data = map(self.vocabulary.renumber, (*both, self.score_data))
            self.supernet = self.vocabulary.student(supernet)
            self.vocabulary = self.vocabulary.to(ctx.device)
        self.halving = self._halving(())

    @property
    def compared(self) -> bool:
        """Whether candidates stop or go on by comparison with others."""
        return bool(self.halving.steps)

    def __call__(self, architectures: Sequence[Architecture], peers: Sequence[Trial] = ()) -> list[Result]:
        """Trains the candidates shortly; their scores are what `objectives.score` says, on the score split.

        Args:
            architectures: candidates.
            peers: finished trials that count at the rungs, beside the candidates themselves.
        """
        self.halving = self._halving(peers)
        results: dict[int, Result] = {}
        waiting = list(range(len(architectures)))
        while waiting:
            began = time.monotonic()
            together = self._fitting(waiting, architectures)
            members = {k: self._member(architectures[k]) for k in together}
            rungs: dict[int, dict[int, float]] = {k: {} for k in members}
            outcomes = self._train(members, rungs)
            finished = [k for k, o in zip(together, outcomes, strict=True) if o.state != "postponed"]
            scores = self._score([members[k] for k in finished if members[k].reason is None])
            share = (time.monotonic() - began) / len(finished)
            for k in finished:
                reason = members[k].reason
                stopped = reason is not None and reason.startswith(STOPPED)
                score = next(scores) if reason is None else list(rungs[k].values())[-1] if stopped else None
                results[k] = Result(score, reason, share, stopped, attributes(rungs[k]))
            waiting = [k for k in waiting if k not in results]
        return [results[k] for k in range(len(architectures))]

    def _fitting(self, waiting: list[int], architectures: Sequence[Architecture]) -> list[int]:
        """Those that memory holds at once; all of them where they are compared, for then that decides results."""
        if self.compared:
            return waiting
        device = self.ctx.device
        vocabulary = self.ctx.shape.vocab_size if self.vocabulary is None else len(self.vocabulary)
        batch_size = max((p.batch_size for p in (self.settings.text, self.settings.task) if p.steps != 0), default=1)
        workers, _ = side_by_side(self.settings.population, device)
        count = students_at_once(
            [architectures[k] for k in waiting],
            replace(self.ctx.shape, vocab_size=vocabulary),
            batch_size * self.score_data.choices * self.ctx.config.data.max_length,
            workers,
            free_bytes(device),
        )
        return waiting[:count]

    def _targets(self, part: Part, settings: PhaseSettings) -> TeacherTargets:
        """The teacher's answers for a part's batches; those of an earlier stage that trained on the same ones."""
        key = (part, settings.batch_size, settings.fraction, settings.first, settings.sources)
        if key not in self.ctx.proxy_targets:
            self.ctx.proxy_targets[key] = TeacherTargets(self.distillers[part], need_logits=part == "task")
        return self.ctx.proxy_targets[key]

    def _vocabulary(self) -> Vocabulary | None:
        """The tokens of all batches and of the score split; None where they are most of the whole vocabulary."""
        parts = [(self.text, self.settings.text, "text"), (self.task, self.settings.task, "task")]
        tokens = [self.score_data.tokens]
        for data, settings, part in parts:
            if not isinstance(data, EncodedDataset):  # prepared text of any size
                return None
            steps = settings.total_steps(data.num_batches(settings.batch_size))
            tokens += of_first_batches(data, settings.batch_size, self.ctx.seed("proxy", part), steps)
        vocabulary = Vocabulary.of(tokens, self.score_data.pad_id)
        return vocabulary if len(vocabulary) <= WORTHWHILE * self.supernet.config.vocab_size else None

    def _answers(self, targets: TeacherTargets) -> Callable[[int, Batch], EncoderStates]:
        """`targets` for batches with the candidates' token ids."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            return targets.get
        return lambda step, batch: targets.get(step, vocabulary.original(batch))

    def _halving(self, peers: Sequence[Trial]) -> SuccessiveHalving:
        return SuccessiveHalving(self.settings.rungs, self.settings.reduction, self.total_steps, peers)

    def _member(self, architecture: Architecture) -> Member:
        seed_everything(self.ctx.seed(self.name, self.ctx.space.key(architecture)))
        model = extract(self.supernet, architecture, fit_dense=True)
        return Member(model, generator_state(self.ctx.device))

    def _train(self, members: dict[int, Member], rungs: dict[int, dict[int, float]]) -> list[Outcome]:
        """Both phases; `rungs` takes every member's scores at the rungs."""

        def after_step(done: int) -> None:
            if done in self.halving.steps:
                self._halve(done, {k: m for k, m in members.items() if m.alive}, rungs)

        chosen = list(members.values())
        if self.sentinel is not None:
            self._compare_backends(chosen[0], self.sentinel)
            self.sentinel = None
        self._phase(chosen, "text", self.text, self.settings.text, self.text_targets)
        return self._phase(chosen, "task", self.task, self.settings.task, self.task_targets, after_step)

    def _compare_backends(self, member: Member, sentinel: Sentinel) -> None:
        """On the first batch of the task, with the stage's first candidate as it starts."""
        steps = self.total_steps * self.settings.trials
        if not sentinel.wants("task", steps):
            return
        model, batch_size = member.model.train(), self.settings.task.batch_size
        batch = next(cycle(self.task, batch_size, seed=self.ctx.seed("proxy", "task"))).to(self.ctx.device)
        targets = self._answers(self.task_targets)(0, batch)
        loss = partial(self.distillers["task"].task_loss, model, batch, targets=targets)
        sentinel.training(self.name, model, loss, kind="task", steps=steps)

    def _halve(self, done: int, living: dict[int, Member], rungs: dict[int, dict[int, float]]) -> None:
        scores = dict(zip(living, self._score(list(living.values())), strict=True))
        goes_on = self.halving.go_on(done, list(scores.values()))
        for (k, member), goes in zip(living.items(), goes_on, strict=True):
            rungs[k][done] = scores[k]
            if not goes:
                member.reason = f"{STOPPED} {done} of its steps, with {scores[k]:.4f}"

    def _phase(
        self,
        members: list[Member],
        part: Part,
        data: PhaseData,
        settings: PhaseSettings,
        targets: TeacherTargets,
        after_step: Callable[[int], None] | None = None,
    ) -> list[Outcome]:
        workers, threads = side_by_side(self.settings.population, self.ctx.device)
        return train_population(
            f"{self.name} {part}",
            members,
            cycle(data, settings.batch_size, seed=self.ctx.seed("proxy", part)),
            self.distillers[part],
            settings,
            settings.total_steps(data.num_batches(settings.batch_size)),
            part,
            targets=self._answers(targets),
            workers=workers,
            threads=threads,
            after_step=after_step,
        )

    def _score(self, members: list[Member]) -> Iterator[float]:
        ctx = self.ctx
        for member in members:
            metrics = evaluate(member.model, self.score_data, ctx.score_spec, precision=ctx.precision)
            yield primary(ctx.score_spec, metrics)[1]
