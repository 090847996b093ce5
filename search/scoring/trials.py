"""The trial loop of every stage: propose, look up, evaluate, record, observe.

Several processes run the same loop beside one another and divide the evaluations (`search.ledger.board`). Groups of
candidates are evaluated out of order, but observed in order and after a fixed delay (`concurrent`), so proposals do not
depend on who was faster.

A resumed run *replays*: the sampler is built anew from its seed and walks through the recorded trials, taking their
scores from the ledger instead of training. Proposals depend only on seed and observations, so a resumed run
proposes what the undisturbed one would have proposed.

Rejected: saving the sampler's state after every trial. It is one more file to keep consistent with the ledger, and a
kill between the two writes loses or repeats a trial.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from engine.exhaustion import free_memory, is_out_of_memory
from engine.training.loop import Diverged
from search.console.progress import Reporter
from search.ledger.board import Board, LocalBoard
from search.ledger.ledger import Candidate, Ledger, Trial
from search.ledger.records import digest
from search.samplers import Sampler, SpaceExhausted
from search.scoring.failures import by_reason
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


Evaluate = Callable[[Sequence[Architecture], Sequence[Trial]], list[Result]]
"""Evaluates candidates together; the second argument are the finished trials they may be compared with. A candidate
that diverges or does not fit in memory has a reason and no score; other errors are raised and end the run."""


@dataclass
class TrialLog:
    """What a finished trial loop knows.

    Attributes:
        trials: finished trials in order.
        duplicates: candidates drawn that were the same as an earlier one, by canonical form (dropped by the sampler)
            or by numeric fingerprint, and were not evaluated.
        failures: how many trials failed, by reason.
    """

    trials: list[Trial] = field(default_factory=list)
    duplicates: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    _highest: float = -math.inf

    def add(self, trials: Sequence[Trial]) -> None:
        """Takes in the next finished trials."""
        self.trials += trials
        self.failures += by_reason(t.reason for t in trials if t.state == "failed")
        scores = [t.score for t in trials if t.score is not None and t.state == "complete"]
        self._highest = max([self._highest, *scores])

    def note(self) -> str:
        """The best score so far, for a progress line."""
        return f"best {self._highest:.4f}" if self._highest > -math.inf else ""

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


@dataclass(frozen=True)
class _Group:
    """Candidates proposed together.

    Attributes:
        candidates: with their numbers.
        known: how many trials the sampler had seen.
    """

    candidates: list[Candidate]
    known: int

    def numbers(self) -> list[int]:
        return [c.number for c in self.candidates]


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
    concurrent: int = 1,
    as_group: bool = False,
    compared: bool = False,
    board: Board | None = None,
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
        together: candidates proposed at a time, and evaluated together where one process has time for all of them; the
            sampler sees their scores when all are done.
        concurrent: groups of `together` candidates that are proposed before the first one's scores are seen. Part of
            what is searched: the sampler always sees the scores of group n before it proposes group n + concurrent.
        as_group: results depend on who is evaluated together, so a group cut short by a kill is evaluated again as a
            whole; what was recorded of it stays.
        compared: results depend on the trials given to `evaluate`: those the sampler had seen, and those of the same
            group. A group is not divided among processes; cut short, the rest of it is evaluated.
        board: shares candidates out among processes; None: this one evaluates all.
        on_trial: called after every trial, in order of their numbers, replayed ones included.
    """
    log = TrialLog()
    proposals = _Proposals(sampler, space, log)
    window: deque[_Group] = deque()
    proposed, exhausted = 0, False
    board = board or LocalBoard(ledger, stage)
    limit = together if as_group or compared else max(1, min(together, -(-together * concurrent // board.workers)))
    with board, reporter.phase(f"{stage}: candidates", total) as bar:
        while True:
            while len(window) < concurrent and proposed < total and not exhausted:
                chosen = proposals.draw(min(together, total - proposed))
                exhausted = not chosen
                if chosen:
                    window.append(_Group(_settled(board, chosen, proposed, space), len(log.trials)))
                    proposed += len(chosen)
            if not window:
                break
            finished = board.finished()
            if all(n in finished for n in window[0].numbers()):
                trials = [_matching(finished[c.number], c, stage) for c in window.popleft().candidates]
                log.add(trials)
                sampler.observe(trials)
                if on_trial is not None:
                    for trial in trials:
                        on_trial(trial)
                bar.update(len(log.trials), log.note(), failures=log.failures)
                continue
            group, numbers = _work(board, window, finished, limit, whole=as_group or compared)
            if not numbers:
                board.wait()
                continue
            if as_group:
                numbers = group.numbers()
            taken = [c for c in group.candidates if c.number in numbers]
            peers = log.trials[: group.known] + [finished[n] for n in group.numbers() if n in finished]
            results = evaluate([c.architecture for c in taken], peers)
            for candidate, result in zip(taken, results, strict=True):
                if candidate.number not in finished:
                    board.finish(_trial(stage, candidate, space, result))
    log.duplicates += sampler.duplicates
    return log


def _settled(board: Board, chosen: list[Architecture], first: int, space: SearchSpace) -> list[Candidate]:
    """The group's candidates as all processes have them."""
    candidates = [Candidate(first + i, a, space.key(a), space.parameters(a)) for i, a in enumerate(chosen)]
    settled = board.settle(candidates)
    return [
        c if c.architecture is a else Candidate(c.number, a, space.key(a), space.parameters(a))
        for c, a in zip(candidates, settled, strict=True)
    ]


def _work(
    board: Board, window: Iterable[_Group], finished: Mapping[int, Trial], limit: int, *, whole: bool
) -> tuple[_Group, list[int]]:
    """The first numbers in `window` that are this process's to evaluate, of one group; none if others have them all."""
    for group in window:
        missing = [n for n in group.numbers() if n not in finished]
        claimed = board.claim(missing, limit, whole=whole) if missing else []
        if claimed:
            break
    return group, claimed


def _matching(trial: Trial, candidate: Candidate, stage: str) -> Trial:
    """`trial`, if it is that of `candidate`."""
    if trial.key != candidate.key:
        raise UserError(
            f"ledger: trial {trial.number} of {stage} is another candidate than this configuration and seed"
            " propose: resume with the run's own config.yaml, or start a new run"
        )
    return trial


class _Proposals:
    """Candidates that compute something no earlier one computed."""

    def __init__(self, sampler: Sampler, space: SearchSpace, log: TrialLog) -> None:
        self.sampler, self.space, self.log = sampler, space, log
        self.seen: set[bytes] = set()

    def draw(self, count: int) -> list[Architecture]:
        """At most `count` new candidates; fewer only where the space (or patience with duplicates) is exhausted."""
        chosen: list[Architecture] = []
        in_a_row = 0
        while len(chosen) < count and in_a_row < MAX_DUPLICATES_IN_A_ROW:
            try:
                architecture = self.sampler.propose(1)[0]
            except SpaceExhausted:
                break
            function = digest(self.space.function_key(architecture))
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

    def together(architectures: Sequence[Architecture], _: Sequence[Trial] = ()) -> list[Result]:
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


def _trial(stage: str, candidate: Candidate, space: SearchSpace, result: Result) -> Trial:
    return Trial(
        stage=stage,
        number=candidate.number,
        architecture=candidate.architecture,
        key=candidate.key,
        score=result.score,
        params=candidate.params,
        seconds=result.seconds,
        state="pruned" if result.pruned else "complete" if result.reason is None else "failed",
        reason=result.reason,
        attrs={**_costs(candidate.architecture, space), **result.attrs},
    )


def _costs(architecture: Architecture, space: SearchSpace) -> dict[str, float]:
    """Costs beside the parameters, for the ledger."""
    if space.limits is None:
        return {}
    return {name: value for name, value in space.limits.costs.of(architecture).items() if name != "params"}
