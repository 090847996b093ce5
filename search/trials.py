"""The trial loop of every stage: propose, look up, evaluate, record, observe.

A resumed run *replays*: the sampler is built anew from its seed and walks through the recorded trials, taking their
scores from the ledger instead of training. Proposals depend only on seed and observations, so a resumed run
proposes what the undisturbed one would have proposed.

Rejected: saving the sampler's state after every trial. It is one more file to keep consistent with the ledger, and a
kill between the two writes loses or repeats a trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from engine.architecture import Architecture
from engine.errors import UserError
from engine.training import Diverged
from search.ledger import Ledger, Trial
from search.progress import Reporter
from search.samplers import Sampler, SpaceExhausted
from search.space import SearchSpace

MAX_DUPLICATES_IN_A_ROW = 1000


@dataclass
class TrialLog:
    """What a finished trial loop knows.

    Attributes:
        trials: finished trials in order.
        duplicates: candidates drawn that were the same as an earlier one, by canonical form (dropped by the sampler)
            or by numeric fingerprint, and were not evaluated.
    """

    trials: list[Trial] = field(default_factory=list)
    duplicates: int = 0

    def best(self) -> Trial:
        """The best complete trial; ties go to fewer parameters, then to the earlier trial.

        Raises:
            UserError: no trial completed.
        """
        complete = [t for t in self.trials if t.score is not None]
        if not complete:
            reasons = sorted({t.reason or "unknown" for t in self.trials})
            raise UserError(f"no candidate finished training ({'; '.join(reasons)}): lower the learning rates")
        return min(complete, key=lambda t: (-t.score, t.params, t.number))


def run_trials(
    stage: str,
    total: int,
    sampler: Sampler,
    space: SearchSpace,
    evaluate: Callable[[Architecture], float],
    ledger: Ledger,
    reporter: Reporter,
    *,
    on_trial: Callable[[Trial], None] | None = None,
) -> TrialLog:
    """Evaluates `total` different candidates, or all there are.

    Args:
        stage: name of the stage in the ledger.
        total: candidates to evaluate.
        sampler: proposes candidates; observes every finished trial.
        space: the space the candidates come from.
        evaluate: trains and scores a candidate; higher is better. It may raise `Diverged` or run out of memory: the
            trial is recorded as failed with its reason, which is not a score. Other errors end the run.
        ledger: finished trials are read from and written to it.
        reporter: shows progress.
        on_trial: called after every trial, replayed ones included.
    """
    log = TrialLog()
    recorded = {t.number: t for t in ledger.trials(stage)}
    seen: set[str] = set()
    in_a_row = 0
    with reporter.phase(f"{stage}: candidates", total) as bar:
        while len(log.trials) < total and in_a_row < MAX_DUPLICATES_IN_A_ROW:
            try:
                architecture = sampler.propose(1)[0]
            except SpaceExhausted:
                break
            function = space.function_key(architecture)
            if function in seen:
                log.duplicates += 1
                in_a_row += 1
                continue
            in_a_row = 0
            number = len(log.trials)
            trial = recorded.get(number)
            if trial is None:
                trial = _evaluate(stage, number, architecture, space, evaluate)
                ledger.record(trial)
            elif trial.key != space.key(architecture):
                raise UserError(
                    f"ledger: trial {number} of {stage} is another candidate than this configuration and seed propose:"
                    " resume with the run's own config.yaml, or start a new run"
                )
            seen.add(function)
            log.trials.append(trial)
            sampler.observe([trial])
            if on_trial is not None:
                on_trial(trial)
            scores = [t.score for t in log.trials if t.score is not None]
            failed = len(log.trials) - len(scores)
            note = f"best {max(scores):.4f}" if scores else ""
            bar.update(len(log.trials), note + (f", {failed} failed" if failed else ""))
    log.duplicates += sampler.duplicates
    return log


def _evaluate(
    stage: str, number: int, architecture: Architecture, space: SearchSpace, evaluate: Callable[[Architecture], float]
) -> Trial:
    began = time.monotonic()
    score: float | None = None
    reason = None
    try:
        score = evaluate(architecture)
    except Diverged as error:
        reason = str(error)
    except torch.OutOfMemoryError:
        reason = "out of memory"
        torch.cuda.empty_cache()
    return Trial(
        stage=stage,
        number=number,
        architecture=architecture,
        key=space.key(architecture),
        score=score,
        params=space.parameters(architecture),
        seconds=time.monotonic() - began,
        state="complete" if reason is None else "failed",
        reason=reason,
        attrs={},
    )
