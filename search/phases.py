"""Training phases of a run: run once, saved whole, skipped on resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from engine.checkpoint import load_weights, save_weights
from engine.data import Batch, EncodedDataset
from engine.objective import KDLoss
from engine.seeding import seed_everything
from engine.settings import PhaseSettings
from engine.training import PhaseLog, cycle, run_phase
from search.context import Context


def phase_data(ctx: Context, data: EncodedDataset, settings: PhaseSettings, name: str) -> EncodedDataset:
    """The share of `data` a phase uses; the same for every trial of a stage."""
    if settings.fraction >= 1.0:
        return data
    return data.subset(max(1, round(settings.fraction * len(data))), seed=ctx.seed(name, "subset"))


def train_phase(
    ctx: Context,
    name: str,
    model: nn.Module,
    data: EncodedDataset,
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
    """Trains `model` as `settings` say and writes its weights to `result`, or loads them if they are there.

    Args:
        ctx: the run.
        name: of the phase; names its seed, its log lines and its checkpoint.
        model: trained or loaded in place.
        data: encoded sequences; `settings.fraction` of them are used.
        settings: the phase's settings; zero steps only writes `result`.
        loss: `loss(batch, step)`.
        result: where the finished weights go.
        after_step, extra_state, restore_extra: passed to `engine.training.run_phase`.
        finish: called on the trained model before its weights are written.
        order: phases of the same `order` see the same batches in the same order, whatever their names.
    """
    if result.exists():
        load_weights(result, model)
        model.eval()
        return
    seed_everything(ctx.seed(name))
    data = phase_data(ctx, data, settings, order or name)
    order_seed = ctx.seed(order or name, "order")
    total = settings.total_steps(data.num_batches(settings.batch_size))
    checkpoint = ctx.rundir.checkpoints / f"{name}.pt"
    with ctx.timed(name):
        if total:
            with ctx.reporter.phase(name, total) as bar:

                def log(line: PhaseLog) -> None:
                    ctx.log_phase(line)
                    bar.update(line.step, f"loss {line.losses['total']:.4f}")

                run_phase(
                    name,
                    model,
                    lambda start: cycle(data, settings.batch_size, seed=order_seed, start_step=start),
                    loss,
                    settings,
                    total,
                    log=log,
                    checkpoint=checkpoint,
                    checkpoint_every=ctx.config.checkpoint_every,
                    after_step=after_step,
                    extra_state=extra_state,
                    restore_extra=restore_extra,
                )
        if finish is not None:
            finish()
    save_weights(result, model)
    checkpoint.unlink(missing_ok=True)
