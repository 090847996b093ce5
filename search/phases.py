"""Training phases of a run: run once, saved whole, skipped on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from engine.data import Batch, EncodedDataset
from engine.data.mixture import TaskMixture
from engine.data.shards import ShardedText
from engine.distill.target_cache import BatchPlan
from engine.objective import KDLoss
from engine.seeding import seed_everything
from engine.training.checkpoint import (
    Damaged,
    load_weights,
    remove_training_state,
    remove_weights,
    save_weights,
    second_copy,
    untrained,
)
from engine.training.loop import PhaseLog, cycle, run_phase
from engine.training.settings import PhaseSettings
from search.context import Context

PhaseData = EncodedDataset | ShardedText | TaskMixture
"""What a phase may train on: the part of `EncodedDataset` that phases use."""


def phase_data(ctx: Context, data: PhaseData, settings: PhaseSettings, name: str) -> PhaseData:
    """The sources and the share of `data` a phase uses; the same for every trial of a stage."""
    if settings.sources is not None and not isinstance(data, TaskMixture):
        data = data.of_sources(settings.sources)
    if settings.fraction >= 1.0:
        return data
    if settings.first:
        return data.first(max(1, int(settings.fraction * len(data))))
    return data.subset(max(1, round(settings.fraction * len(data))), seed=ctx.seed(name, "subset"))


def batch_plan(ctx: Context, data: PhaseData, settings: PhaseSettings, order: str) -> BatchPlan:
    """The batches of a phase of that order, and this rank's share of them."""
    data = phase_data(ctx, data, settings, order)
    return BatchPlan(
        data=cast("EncodedDataset", data),  # the others have what a plan asks of it
        batch_size=settings.batch_size,
        seed=ctx.seed(order, "order"),
        steps=settings.total_steps(data.num_batches(settings.batch_size)),
        micro_batches=settings.accumulate,
        rank=ctx.ranks.rank,
        ranks=ctx.ranks.size,
    )


def train_phase(
    ctx: Context,
    name: str,
    model: nn.Module,
    data: PhaseData,
    settings: PhaseSettings,
    loss: Callable[[Batch, int], KDLoss],
    result: Path,
    *,
    after_step: Callable[[int], None] | None = None,
    extra_state: Callable[[], dict[str, Tensor]] | None = None,
    restore_extra: Callable[[dict[str, Tensor]], None] | None = None,
    finish: Callable[[], None] | None = None,
    order: str | None = None,
) -> None:
    """Trains `model` as `settings` say and writes the trained weights to `result`, or loads them if they are there.

    All ranks train together; the first reads and writes the files and calls the hooks, and all end with its weights.
    A worker that joined a search waits for that search's weights instead.

    Args:
        ctx: the run.
        name: of the phase; names its seed, its log lines and its checkpoint.
        model: trained or loaded in place.
        data: encoded sequences; `settings.fraction` of them are used.
        settings: the phase's settings; zero steps only writes `result`.
        loss: `loss(batch, step)`.
        result: where the finished weights go.
        after_step, extra_state, restore_extra: passed to `engine.training.loop.run_phase`.
        finish: called on the trained model before its weights are written.
        order: phases of the same `order` see the same batches in the same order, whatever their names.
    """
    ranks = ctx.ranks
    if ctx.joined is not None:
        ctx.load_joined(result.relative_to(ctx.rundir.path), model)
        return
    if read_back(ctx, name, model, result):
        return
    seed_everything(ctx.seed(name) if ranks.is_first else ctx.seed(name, "rank", ranks.rank))
    plan = batch_plan(ctx, data, settings, order or name)
    checkpoint = ctx.rundir.checkpoints / f"{name}.pt"
    with ctx.timed(name):
        if plan.steps:
            with ctx.reporter.phase(name, plan.steps) as bar:

                def log(line: PhaseLog) -> None:
                    ctx.log_phase(line)
                    bar.update(line.step, f"loss {line.losses['total']:.4f}")

                run_phase(
                    name,
                    model,
                    lambda start: cycle(plan.data, plan.batch_size, seed=plan.seed, start_step=start),
                    loss,
                    settings,
                    plan.steps,
                    log=log,
                    checkpoint=checkpoint,
                    checkpoint_every=ctx.config.checkpoint_every,
                    after_step=after_step,
                    extra_state=extra_state,
                    restore_extra=restore_extra,
                    weights=ctx.distiller().weights,
                    ranks=ranks,
                    sentinel=ctx.sentinel,
                )
        if finish is not None:
            ranks.first(finish)
        ranks.spread(model)
    ranks.first(lambda: save_weights(result, model, without=untrained(model)))
    if ranks.is_first:
        remove_training_state(checkpoint)


def read_back(ctx: Context, name: str, model: nn.Module, result: Path) -> bool:
    """Whether the phase was finished before; its weights, those `train_phase` wrote, are then in `model`, on all ranks.

    Not for workers that joined a search.
    """
    if not ctx.ranks.agree(lambda: _finished(ctx, name, result, model)):
        return False
    ctx.ranks.spread(model)
    model.eval()
    return True


def _finished(ctx: Context, name: str, result: Path, model: nn.Module) -> bool:
    """Whether the phase was finished before; its weights are then in `model`.

    Where they are damaged beyond repair the phase is trained once more: from the same seed it ends as it did.
    """
    if not (result.exists() or second_copy(result).exists()):
        return False
    try:
        load_weights(result, model, without=untrained(model))
    except Damaged as error:
        ctx.reporter.info(f"{str(error).partition(': delete')[0]}: {name} is trained again")
        remove_weights(result)
        return False
    return True
