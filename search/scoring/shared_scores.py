"""Scores of stage 3's candidates with the supernet's shared weights.

The work is done by `engine.evaluation.shared`, races are run by `engine.evaluation.racing`. Without a race a score is,
bit for bit, what evaluating the candidate alone would give. In a race candidates that cannot win any more are recorded
as pruned, with the score on what they were asked. Spans and choices are read from all tokens of all their sequences, so
their candidates are evaluated one by one.

Rejected: giving a race the best of earlier groups as an opponent. A resumed run would have to know who that was when
the group was first evaluated, for little: a group's own best is seldom far behind.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate, predict_batches
from engine.evaluation.metrics import primary
from engine.evaluation.race_subnets import race_subnets
from engine.evaluation.shared import SharedEvaluator
from engine.exhaustion import free_memory, is_out_of_memory
from engine.student.modeling import FFNASPreTrainedModel
from engine.training.sentinel import Sentinel
from search.context import Context
from search.ledger.ledger import Trial
from search.scoring.trials import Result, one_by_one

RACE_BATCH = 64
"""Sequences per batch of a race, whose slices are small."""


class SharedScorer:
    """Scores candidates together.

    Args:
        ctx: the run.
        model: the trained supernet.
    """

    def __init__(self, ctx: Context, model: FFNASPreTrainedModel) -> None:
        self.ctx, self.model = ctx, model
        self.settings = ctx.config.stage3
        self.sentinel = ctx.sentinel
        data = ctx.data.score
        self.evaluator: SharedEvaluator | None = None
        if not ctx.spec.head.pooled:
            if self.settings.race > 1:
                raise UserError(f"stage3.race: a {ctx.spec.kind} task cannot be raced: set it to 0")
            return
        slices = min(self.settings.race, len(data))
        if slices > 1:
            seed = ctx.seed("stage3", "race")
            cut = SharedEvaluator(model, data, precision=ctx.precision, slices=slices, batch_size=RACE_BATCH, seed=seed)
            self.evaluator = cut
        else:
            self.evaluator = SharedEvaluator(model, data, precision=ctx.precision)

    def __call__(self, architectures: Sequence[Architecture], _: Sequence[Trial] = ()) -> list[Result]:
        """One result per candidate; none depends on earlier trials."""
        if self.evaluator is None:
            return one_by_one(self._alone)(architectures, ())
        began = time.monotonic()
        if self.sentinel is not None:
            self._compare_backends(architectures[0], self.sentinel)
            self.sentinel = None
        try:
            score = self._race if len(self.evaluator.slices) > 1 else self._score
            results = score(self.evaluator, architectures)
        except (RuntimeError, MemoryError) as error:  # without anything kept for others
            if not is_out_of_memory(error):
                raise
            self.evaluator.store.clear()
            free_memory()
            return one_by_one(self._alone)(architectures, ())
        share = (time.monotonic() - began) / len(architectures)
        return [Result(r.score, r.reason, share, r.pruned) for r in results]

    def _compare_backends(self, architecture: Architecture, sentinel: Sentinel) -> None:
        """On the first batch of the split that scores, with the first candidate."""
        data, precision = self.ctx.data.score, self.ctx.precision
        batch = next(data.batches(RACE_BATCH, seed=0, epoch=0, shuffle=False))

        def logits() -> Tensor:
            answers, _ = predict_batches(self.model, [batch], precision=precision, architecture=architecture)
            return torch.from_numpy(answers)

        sentinel.scoring("stage3", logits)

    def _score(self, evaluator: SharedEvaluator, architectures: Sequence[Architecture]) -> list[Result]:
        spec = self.ctx.score_spec
        return [Result(primary(spec, m)[1]) for m in evaluator.evaluate(architectures, spec)]

    def _race(self, evaluator: SharedEvaluator, architectures: Sequence[Architecture]) -> list[Result]:
        finishes = race_subnets(evaluator, architectures, self.ctx.spec, confidence=self.settings.confidence)
        return [
            Result(f.score, None if f.survived else f"behind after {f.answered} examples", pruned=not f.survived)
            for f in finishes
        ]

    def _alone(self, architecture: Architecture) -> float:
        ctx, spec = self.ctx, self.ctx.score_spec
        metrics = evaluate(self.model, ctx.data.score, spec, precision=ctx.precision, architecture=architecture)
        return primary(spec, metrics)[1]
