"""`budget.keep`: the smallest student that holds a share of the teacher's score.

One student of every size on a ladder (shares of the encoder: 3/4 down to 1/16) is trained in one last round. What each
is short of the teacher by then, the full distillation about halves; the smallest student for which that is enough is
distilled in full first. If it holds the share, the next smaller ones follow until one does not; if not, the next larger
ones until one does. Measured is the task's metric on the score and select splits, of student and teacher alike; dev
decides nothing. Several sizes are looked at, so the first to pass may owe it to chance (docs/decisions/0029).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from engine.architecture.architecture import Architecture
from engine.data import EncodedDataset, EncodedTask
from engine.data.task import NEG_LOG_LOSS
from engine.errors import UserError
from engine.evaluation.evaluation import predict_rows
from search.config.schema import BudgetConfig
from search.context import Context, Prepared
from search.derive import Derived
from search.evidence.resample import resampled
from search.inherit.candidates import first_layers
from search.inherit.last_round import Entrant, last_round, remove_round, scoring_rows
from search.inherit.latency import Milliseconds
from search.inherit.library import Library
from search.inherit.limits import budget_of
from search.inherit.total import Tables
from search.inherit.variants import Variants, kept
from search.ledger.ledger import Trial

SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
"""Sizes of the ladder, as shares of the parameters of the teacher's layers."""

LEFT = 0.5
"""What the full distillation leaves of what a student is short of after the last round. On the demo the divergence of
two students fell from 0.039 and 0.109 after the round to 0.030 and 0.045."""

METRIC = "metric"
"""Of a trial of the ladder: the metric on the rows of the last round."""

Finish = Callable[[str, Architecture, Sequence[Entrant]], Derived]
"""Distils a student in full, under a name; given the round it comes from, too."""


@dataclass
class Rung:
    """A size of the ladder.

    Attributes:
        share: of the parameters of the teacher's layers, at most.
        architecture: of its student.
        early: share of the teacher's score after the last round; None where that training failed.
        derived: once distilled in full.
        late: share of the teacher's score then, with the ends of its 95 % interval.
    """

    share: float
    architecture: Architecture
    early: float | None = None
    derived: Derived | None = None
    late: tuple[float, float, float] | None = None

    @property
    def name(self) -> str:
        """Of its files and in summary and report."""
        return f"encoder-{self.share:g}"


def check_ladder(ctx: Prepared, made: Variants) -> None:
    """Raises `UserError` where `budget.keep` cannot be answered."""
    if ctx.spec.metric == NEG_LOG_LOSS:
        raise UserError(
            f"budget.keep: {ctx.config.budget.keep}: no share of {ctx.spec.metric} says how good a student is: use"
            " another --data.metric"
        )
    least = min(made.layer(spec) for spec in made.specs if not spec.skipped)
    if least > SHARES[-1] * made.encoder(made.whole):
        raise UserError(
            "budget.keep: no student of this teacher is smaller than 3/4 of its layers: allow narrower layers"
            " (--inherit.ratios)"
        )


def hold(
    ctx: Context, library: Library, tables: Tables, finish: Finish
) -> tuple[Derived, dict[str, Derived], dict[str, Any]]:
    """The found model, the other finished students by name, and the ladder for summary.json."""
    keep = ctx.config.budget.keep
    assert keep is not None
    rungs = ladder(ctx, library, tables)
    splits = scoring_rows(ctx)
    own = _score(ctx, _rows(ctx, ctx.teacher.model, splits, teacher=True), splits)
    if own <= 0:
        raise UserError(
            f"budget.keep: {keep}: the teacher's {ctx.spec.metric} on held-out rows is {own:.4f}, and a share of that"
            " says nothing: look at the teacher first, or give a size (--budget.encoder)"
        )
    trials = last_round(
        ctx,
        library,
        _entrants(rungs),
        lambda a: tables.total(a, tables.choose(a)),
        lambda model: {METRIC: _score(ctx, _rows(ctx, model, splits), splits)},
    )
    for rung, trial in zip(rungs, trials, strict=True):
        rung.early = _early(trial, own)
        told = "training failed" if rung.early is None else f"{rung.early:.3f} of the teacher's {ctx.spec.metric}"
        ctx.reporter.info(f"{rung.share:g} of the encoder, after the last round: {told}")
    measured = _Held(ctx, tables, lambda name, architecture: finish(name, architecture, _entrants(rungs)))
    chosen = climb(rungs, keep, measured)
    remove_round(ctx, [rung.name for rung in rungs])
    for rung in rungs:
        if rung.late is not None:
            ctx.reporter.info(f"{rung.share:g} of the encoder, distilled: {_words(rung.late)}")
    assert chosen.derived is not None
    found = {"search" if rung is chosen else rung.name: rung.derived for rung in rungs if rung.derived is not None}
    facts = _facts(rungs, chosen, keep, measured.value, ctx, library.variants)
    ctx.reporter.info(facts["verdict"])
    return chosen.derived, found, facts


def _entrants(rungs: Sequence[Rung]) -> list[Entrant]:
    """Of the last round, a group each."""
    return [Entrant(rung.name, rung.architecture) for rung in rungs]


def ladder(ctx: Prepared, library: Library, tables: Tables) -> list[Rung]:
    """Students of all sizes there are, smallest first; sizes with the same student count once."""
    rungs: dict[Architecture, Rung] = {}
    for share in SHARES:
        budget = budget_of(ctx, library.variants, tables, _no_times, BudgetConfig(encoder=share))
        made = first_layers(library, budget)
        if made is not None:
            rungs.setdefault(made, Rung(share, made))
    return list(rungs.values())


def climb(rungs: Sequence[Rung], keep: float, measure: Callable[[Rung], float]) -> Rung:
    """The smallest rung found that holds `keep`; where none does, the one that comes closest.

    `measure` gives the share that a rung's student holds once distilled in full.
    """
    promising = [k for k, rung in enumerate(rungs) if rung.early is not None and 1 - LEFT * (1 - rung.early) >= keep]
    place = promising[0] if promising else len(rungs) - 1
    shares = {place: measure(rungs[place])}
    if shares[place] >= keep:
        while place > 0 and shares[place] >= keep:
            place -= 1
            shares[place] = measure(rungs[place])
    else:
        while place + 1 < len(rungs) and shares[place] < keep:
            place += 1
            shares[place] = measure(rungs[place])
    holding = [k for k in sorted(shares) if shares[k] >= keep]
    return rungs[holding[0] if holding else max(shares, key=lambda k: (shares[k], -k))]


class _Held:
    """Distils and measures rungs; the teacher is measured once."""

    def __init__(self, ctx: Context, tables: Tables, finish: Callable[[str, Architecture], Derived]) -> None:
        self.ctx, self.tables, self.finish = ctx, tables, finish
        self.splits = [ctx.data.score, ctx.data.select]
        self.labels = np.concatenate([split.labels for split in self.splits])
        self.rows = _rows(ctx, ctx.teacher.model, self.splits, teacher=True)
        self.value = _score(ctx, self.rows, self.splits)

    def __call__(self, rung: Rung) -> float:
        ctx = self.ctx
        rung.derived = self.finish(rung.name, rung.architecture)
        data: EncodedTask = self.tables.data(self.tables.choose(rung.architecture))
        rows = _rows(ctx, rung.derived.model, [data.score, data.select])
        share = _score(ctx, rows, self.splits) / self.value if self.value > 0 else 0.0
        seed = ctx.seed("keep") % 2**32
        own, whole = (resampled(ctx.spec, r, self.labels, seed=seed) for r in (rows, self.rows))
        shares = np.divide(own, whole, out=np.zeros_like(own), where=whole > 0)
        low, high = np.quantile(shares, [0.025, 0.975])
        rung.late = (share, float(low), float(high))
        return share


def _no_times() -> Milliseconds:
    raise ValueError("the ladder has no limit on latency")


def _early(trial: Trial, teacher: float) -> float | None:
    value = trial.attrs.get(METRIC)
    return None if value is None else float(value) / teacher


def _rows(ctx: Prepared, model: nn.Module, splits: Sequence[EncodedDataset], *, teacher: bool = False) -> np.ndarray:
    """Answers [N, C] to the rows of the splits."""
    precision = ctx.config.teacher_precision if teacher else ctx.precision
    return np.concatenate([predict_rows(model, split, precision=precision) for split in splits])


def _score(ctx: Prepared, rows: np.ndarray, splits: Sequence[EncodedDataset]) -> float:
    return ctx.spec.head.metric(ctx.spec, rows, np.concatenate([split.labels for split in splits]))


def _words(late: tuple[float, float, float]) -> str:
    return f"{late[0]:.3f} of the teacher's score (95 % interval {late[1]:.3f} to {late[2]:.3f})"


def _facts(
    rungs: Sequence[Rung], chosen: Rung, keep: float, teacher: float, ctx: Prepared, made: Variants
) -> dict[str, Any]:
    """The ladder as summary.json holds it."""
    assert chosen.late is not None
    rows = len(ctx.data.score) + len(ctx.data.select)
    held = chosen.late[0] >= keep
    start = (
        f"{chosen.share:g} of the encoder, the smallest size tried that holds {keep:g}"
        if held
        else f"no size of the ladder holds {keep:g}; closest is {chosen.share:g} of the encoder"
    )
    below = rungs[rungs.index(chosen) - 1] if rungs.index(chosen) else None
    after = f"; {below.share:g} holds {below.late[0]:.3f}" if held and below is not None and below.late else ""
    return {
        "wanted": keep,
        "held": held,
        "metric": ctx.spec.metric,
        "split": "score and select",
        "rows": rows,
        "teacher": teacher,
        "share": chosen.share,
        "ladder": [
            {
                "share": rung.share,
                "encoder": made.encoder(rung.architecture),
                "layers": list(kept(rung.architecture)),
                "after the last round": rung.early,
                "distilled": rung.late and dict(zip(("value", "low", "high"), rung.late, strict=True)),
            }
            for rung in rungs
        ],
        "verdict": f"{start}: {_words(chosen.late)} on {rows:,} held-out rows{after}",
    }
