"""The last round: whole students distilled shortly side by side, the lagging half of each group stopped at every rung.

Groups are the solved students, the uniform ones and the random ones. All get the same batches and one teacher pass per
batch; each rung keeps the better half of every group, so that no group is judged more kindly than another. A student's
score is minus the mean KL divergence from the teacher on the scoring rows: its own weights, its own training.

The round is one piece of work: a kill repeats it from its beginning, which gives the same trials. The weights of each
group's best student are kept until that student is distilled in full, without the tables, which are the teacher's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.data import Batch, EncodedDataset
from engine.distill import Member
from engine.distill.inherited import InheritedDistiller
from engine.distill.population import PopulationStep, generator_state, side_by_side
from engine.evaluation.evaluation import run_batches
from engine.seeding import seed_everything
from engine.student.modeling import FFNASPreTrainedModel
from engine.training.checkpoint import load_weights, remove_weights, save_weights, untrained
from engine.training.loop import cycle
from engine.training.settings import PhaseSettings
from search.context import Context
from search.inherit.library import Library
from search.inherit.variants import Variants
from search.ledger.ledger import Trial

STAGE = "round"


@dataclass
class Entrant:
    """A student in the round.

    Attributes:
        group: whom it is compared with: "solved", "uniform" or "random", or a group of its own.
        architecture: of as many layers as the teacher, skipped ones included.
        rungs: optimizer steps -> score.
        member: while it trains.
        stopped: step after which it was stopped.
    """

    group: str
    architecture: Architecture
    rungs: dict[int, float] = field(default_factory=dict)
    member: Member | None = None
    stopped: int | None = None


def last_round(
    ctx: Context,
    library: Library,
    entrants: Sequence[Entrant],
    params: Callable[[Architecture], int],
    also: Callable[[torch.nn.Module], dict[str, float]] = lambda _: {},
) -> list[Trial]:
    """Trains and scores the entrants; trials in their order, read from the ledger where the round was finished.

    `params` says how many parameters a finished student has, `also` what else of a trained one goes into its trial.
    """
    known = ctx.ledger.trials(STAGE)
    if len(known) == len(entrants):
        return known
    with ctx.timed("last round"):
        _train(ctx, library, entrants)
        trials = [_trial(params, number, entrant) for number, entrant in enumerate(entrants)]
        _save_best(ctx, entrants, trials)
        for trial, entrant in zip(trials, entrants, strict=True):
            if trial.state == "complete" and entrant.member is not None:
                trial.attrs.update(also(entrant.member.model))
        for trial in trials:
            ctx.ledger.record(trial)
            if ctx.scalars is not None:
                ctx.scalars.trial(trial)
    return trials


def train_again(ctx: Context, library: Library, entrants: Sequence[Entrant], trials: Sequence[Trial]) -> None:
    """Makes lost weights of a finished round: from the same seed it ends as it did, with the `trials` of the ledger."""
    with ctx.timed("last round"):
        _train(ctx, library, entrants)
        _save_best(ctx, entrants, trials)


def _save_best(ctx: Context, entrants: Sequence[Entrant], trials: Sequence[Trial]) -> None:
    """Writes the weights of every group's best student."""
    for group in dict.fromkeys(e.group for e in entrants):
        winner = best_of(trials, group)
        member = entrants[winner.number].member if winner is not None else None
        if member is not None:
            save_weights(weights_of(ctx, group), member.model, without=untrained(member.model))


def load_best(ctx: Context, group: str, model: torch.nn.Module) -> None:
    """Reads the weights of a group's best student into `model`, assembled from the library."""
    tables = {f"{name}.weight" for name, part in model.named_modules() if name.rpartition(".")[2] in _TABLES}
    load_weights(weights_of(ctx, group), model, without=tables)


def weights_of(ctx: Context, group: str) -> Path:
    """Weights of a group's best student at the end of the round."""
    return ctx.rundir.checkpoints / f"round {group}.safetensors"


def remove_round(ctx: Context, groups: Sequence[str]) -> None:
    """Removes the weights of the groups' students, unless the run keeps everything."""
    if ctx.config.files == "models":
        for group in groups:
            remove_weights(weights_of(ctx, group))


def best_of(trials: Sequence[Trial], group: str) -> Trial | None:
    """The best student of a group that trained to the end of the round; of none that did, the best stopped one."""
    own = [t for t in trials if t.attrs.get("group") == group and t.score is not None]
    finished = [t for t in own if t.state == "complete"] or own
    return min(finished, key=lambda t: (-(t.score or 0.0), t.params, t.number), default=None)


def rungs_of(steps: int, count: int) -> list[int]:
    """Steps at which students are compared: `count` evenly spaced halvings before the end, and the end.

    Evenly, since a look after a few steps says little: measured on SST-2, ranks after 15 steps agree with the final
    ones at 0.61, after 30 at 0.84.
    """
    return sorted({max(1, round(steps * k / (count + 1))) for k in range(1, count + 2)})


def scoring_rows(ctx: Context) -> list[EncodedDataset]:
    """Rows of the score and select splits that students are scored on, `inherit.score_rows` in all, at most."""
    most = ctx.config.inherit.score_rows
    score, select = ctx.data.score, ctx.data.select
    share = min(1.0, most / (len(score) + len(select)))
    parts = (("score", score), ("select", select))
    return [d.subset(max(1, round(share * len(d))), seed=ctx.seed("round", name)) for name, d in parts]


def _train(ctx: Context, library: Library, entrants: Sequence[Entrant]) -> None:
    settings = ctx.config.inherit
    phase = PhaseSettings(steps=settings.round_steps, batch_size=settings.batch_size, lr=settings.lr)
    rungs = rungs_of(settings.round_steps, settings.rungs)
    distiller = ctx.distiller()
    assert isinstance(distiller, InheritedDistiller)
    wanted = [answer for data in scoring_rows(ctx) for answer in teacher_answers(ctx, data)]
    for entrant in entrants:
        seed_everything(ctx.seed("round", entrant.architecture.key()))
        model = library.assemble(entrant.architecture)
        freeze_embeddings(model, share=library.model)
        entrant.member = Member(model, generator_state(ctx.device))
    workers, threads = side_by_side(len(entrants), ctx.device)
    members = [e.member for e in entrants if e.member is not None]
    batches = cycle(ctx.data.train, settings.batch_size, seed=ctx.seed("round", "order"))
    costs = _costs(library.variants, entrants, settings.round_steps, rungs)
    began = time.monotonic()
    with (
        PopulationStep(
            distiller, members, phase, settings.round_steps, "task", workers=workers, threads=threads
        ) as step,
        ctx.reporter.phase("last round", settings.round_steps, costs=costs) as bar,
    ):
        for done in range(1, settings.round_steps + 1):
            step(next(batches), done - 1)
            if done in rungs:
                step.retire_diverged("last round", done)
                _compare(ctx, entrants, done, wanted, last=done == settings.round_steps)
                _track(ctx, entrants, done)
            living = sum(m.alive for m in members)
            bar.update(done, f"{living} students, {time.monotonic() - began:.0f} s")


def _costs(variants: Variants, entrants: Sequence[Entrant], steps: int, rungs: Sequence[int]) -> list[float]:
    """What every step costs, in passes through the teacher's layers: its own, and of each student still trained one
    forward and back, through a share of them that is the entrants' mean. At every rung half of each group stops."""
    whole = variants.encoder(variants.whole) * max(1, len(entrants))
    share = sum(variants.encoder(e.architecture) for e in entrants) / whole
    living = [sum(e.group == group for e in entrants) for group in dict.fromkeys(e.group for e in entrants)]
    costs = []
    for step in range(1, steps + 1):
        costs.append(1.0 + 3.0 * share * sum(living))
        if step in rungs:
            living = [-(-count // 2) for count in living]
    return costs


def _compare(
    ctx: Context, entrants: Sequence[Entrant], done: int, wanted: list[tuple[Batch, Tensor]], *, last: bool
) -> None:
    """Scores the living; except at the end, the worse half of every group stops."""
    for group in dict.fromkeys(e.group for e in entrants):
        living = [e for e in entrants if e.group == group and e.member is not None and e.member.alive]
        for entrant in living:
            assert entrant.member is not None
            entrant.rungs[done] = -mean_divergence(ctx, entrant.member.model, wanted)
        if last:
            continue
        living.sort(key=lambda e: -e.rungs[done])
        for entrant in living[-(-len(living) // 2) :]:
            assert entrant.member is not None
            entrant.stopped = done
            entrant.member.reason = f"stopped after {done} steps"


def _track(ctx: Context, entrants: Sequence[Entrant], done: int) -> None:
    """Students still trained and the least divergence of each group after `done` steps, for the trackers."""
    if ctx.scalars is None:
        return
    told = {"students": float(sum(e.stopped is None or e.stopped >= done for e in entrants if done in e.rungs))}
    for group in dict.fromkeys(e.group for e in entrants):
        found = [-e.rungs[done] for e in entrants if e.group == group and done in e.rungs]
        if found:
            told[group] = min(found)
    ctx.scalars.values("last round", told, done)


def teacher_answers(ctx: Context, data: EncodedDataset) -> list[tuple[Batch, Tensor]]:
    """Batches of `data` with the teacher's logits [B, C], on the CPU."""
    answers = run_batches(ctx.teacher.model, data.batches(64, shuffle=False), precision=ctx.config.teacher_precision)
    return [(batch, logits) for batch, logits in answers]


def mean_divergence(ctx: Context, model: torch.nn.Module, wanted: list[tuple[Batch, Tensor]]) -> float:
    """Mean KL divergence from the teacher's answers (regression: mean squared difference)."""
    found = run_batches(model, (batch for batch, _ in wanted), precision=ctx.precision)
    rows = [ctx.spec.head.divergence(own, answer) for (_, own), (_, answer) in zip(found, wanted, strict=True)]
    return float(torch.cat(rows).mean())


_TABLES = ("token_embeddings", "position_embeddings", "segment_embeddings")


def freeze_embeddings(model: FFNASPreTrainedModel, share: FFNASPreTrainedModel | None = None) -> None:
    """Tables of tokens, positions and segments are not trained; with `share`, they are that model's own."""
    own = model.base_model.embeddings
    for name in _TABLES:
        table = getattr(own, name)
        if share is not None:
            table.weight = torch.nn.Parameter(getattr(share.base_model.embeddings, name).weight, requires_grad=False)
        table.weight.requires_grad_(False)


def _trial(params: Callable[[Architecture], int], number: int, entrant: Entrant) -> Trial:
    member = entrant.member
    assert member is not None
    score = list(entrant.rungs.values())[-1] if entrant.rungs else None
    failed = score is None or (member.reason is not None and entrant.stopped is None)
    state = "failed" if failed else "pruned" if entrant.stopped is not None else "complete"
    return Trial(
        stage=STAGE,
        number=number,
        architecture=entrant.architecture,
        key=entrant.architecture.key(),
        score=None if failed else score,
        params=params(entrant.architecture),
        seconds=0.0,
        state=state,
        reason=member.reason,
        attrs={"group": entrant.group, "rungs": {str(k): v for k, v in entrant.rungs.items()}},
    )
