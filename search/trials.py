"""The trial loop of every stage: propose, look up, evaluate, record, observe.

A resumed run *replays*: the sampler is built anew from its seed and walks through the recorded trials, taking their
scores from the ledger instead of training. Proposals depend only on seed and observations, so a resumed run
proposes what the undisturbed one would have proposed.

Rejected: saving the sampler's state after every trial. It is one more file to keep consistent with the ledger, and a
kill between the two writes loses or repeats a trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.architecture import Architecture
from engine.errors import UserError
from engine.exhaustion import free_memory, is_out_of_memory
from engine.training import Diverged
from search.failures import by_reason
from search.ledger import Ledger, Trial
from search.progress import Reporter
from search.samplers import Sampler, SpaceExhausted
from search.space import SearchSpace

MAX_DUPLICATES_IN_A_ROW = 1000


@dataclass(frozen=True)
class Result:
    """What evaluating a candidate gave.

    Attributes:
        score: higher is better; None when it failed.
        reason: why it failed.
        seconds: wall time, a candidate's share where several were evaluated together.
        pruned: stopped early, for the reason given; the score is the one it had then.
        attrs: further JSON values to record.
    """

    score: float | None
    reason: str | None = None
    seconds: float = 0.0
    pruned: bool = False
    attrs: dict[str, Any] = field(default_factory=dict)


Evaluate = Callable[[Sequence[Architecture]], list[Result]]
"""Evaluates candidates together. A candidate that diverges or does not fit in memory has a reason and no score; other
errors are raised and end the run."""


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
        complete = [
            (-t.score, t.params, t.number, t) for t in self.trials if t.score is not None and t.state == "complete"
        ]
        if not complete:
            reasons = sorted({t.reason or "unknown" for t in self.trials})
            raise UserError(f"no candidate finished training ({'; '.join(reasons)}): lower the learning rates")
        return min(complete)[-1]  # numbers differ, so that trials themselves are never compared


def run_trials(
    stage: str,
    total: int,
    sampler: Sampler,
    space: SearchSpace,
    evaluate: Evaluate,
    ledger: Ledger,
    reporter: Reporter,
    *,
    together: int = 1,
    as_group: bool = False,
    on_trial: Callable[[Trial], None] | None = None,
) -> TrialLog:
    """Evaluates `total` different candidates, or all there are.

    Args:
        stage: name of the stage in the ledger.
        total: candidates to evaluate.
        sampler: proposes candidates; observes every finished trial.
        space: the space the candidates come from.
        evaluate: trains and scores candidates.
        ledger: finished trials are read from and written to it.
        reporter: shows progress.
        together: candidates proposed and evaluated at a time; the sampler sees their scores when all are done.
        as_group: results depend on who is evaluated together, so a group cut short by a kill is evaluated again as a
            whole; what was recorded of it stays.
        on_trial: called after every trial, replayed ones included.
    """
    log = TrialLog()
    recorded = {t.number: t for t in ledger.trials(stage)}
    proposals = _Proposals(sampler, space, log)
    with reporter.phase(f"{stage}: candidates", total) as bar:
        while len(log.trials) < total:
            chosen = proposals.draw(min(together, total - len(log.trials)))
            if not chosen:
                break
            numbers = range(len(log.trials), len(log.trials) + len(chosen))
            missing = [n for n in numbers if n not in recorded]
            if as_group and missing:
                missing = list(numbers)
            results = dict(
                zip(missing, evaluate([chosen[n - numbers[0]] for n in missing]) if missing else (), strict=True)
            )
            trials = []
            for number, architecture in zip(numbers, chosen, strict=True):
                trial = recorded.get(number)
                if trial is None:
                    trial = _trial(stage, number, architecture, space, results[number])
                    ledger.record(trial)
                elif trial.key != space.key(architecture):
                    raise UserError(
                        f"ledger: trial {number} of {stage} is another candidate than this configuration and seed"
                        " propose: resume with the run's own config.yaml, or start a new run"
                    )
                trials.append(trial)
            log.trials += trials
            sampler.observe(trials)
            if on_trial is not None:
                for trial in trials:
                    on_trial(trial)
            scores = [t.score for t in log.trials if t.score is not None and t.state == "complete"]
            failures = by_reason(t.reason for t in log.trials if t.state == "failed")
            bar.update(len(log.trials), f"best {max(scores):.4f}" if scores else "", failures=failures)
    log.duplicates += sampler.duplicates
    return log


class _Proposals:
    """Candidates that compute something no earlier one computed."""

    def __init__(self, sampler: Sampler, space: SearchSpace, log: TrialLog) -> None:
        self.sampler, self.space, self.log = sampler, space, log
        self.seen: set[str] = set()

    def draw(self, count: int) -> list[Architecture]:
        """At most `count` new candidates; fewer only where the space (or patience with duplicates) is exhausted."""
        chosen: list[Architecture] = []
        in_a_row = 0
        while len(chosen) < count and in_a_row < MAX_DUPLICATES_IN_A_ROW:
            try:
                architecture = self.sampler.propose(1)[0]
            except SpaceExhausted:
                break
            function = self.space.function_key(architecture)
            if function in self.seen:
                self.log.duplicates += 1
                in_a_row += 1
                continue
            in_a_row = 0
            self.seen.add(function)
            chosen.append(architecture)
        return chosen


def one_by_one(evaluate: Callable[[Architecture], float]) -> Evaluate:
    """`evaluate` for single candidates, which may raise `Diverged` or run out of memory, as one for several."""

    def together(architectures: Sequence[Architecture]) -> list[Result]:
        return [_timed(evaluate, a) for a in architectures]

    return together


def _timed(evaluate: Callable[[Architecture], float], architecture: Architecture) -> Result:
    began = time.monotonic()
    score, reason = None, None
    try:
        score = evaluate(architecture)
    except Diverged as error:
        reason = str(error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = "out of memory"
        free_memory()
    return Result(score, reason, time.monotonic() - began)


def _trial(stage: str, number: int, architecture: Architecture, space: SearchSpace, result: Result) -> Trial:
    return Trial(
        stage=stage,
        number=number,
        architecture=architecture,
        key=space.key(architecture),
        score=result.score,
        params=space.parameters(architecture),
        seconds=result.seconds,
        state="pruned" if result.pruned else "complete" if result.reason is None else "failed",
        reason=result.reason,
        attrs={**_costs(architecture, space), **result.attrs},
    )


def _costs(architecture: Architecture, space: SearchSpace) -> dict[str, float]:
    """Costs beside the parameters, for the ledger."""
    if space.limits is None:
        return {}
    return {name: value for name, value in space.limits.costs.of(architecture).items() if name != "params"}
