"""The training loop: one phase of optimizer steps over a deterministic order of batches, resumable at any step.

The data position *is* the step number: batch k of epoch e is a function of (seed, e, k), so a checkpoint holds only
model, optimizer, step and generator state. Losses are summed on the device and read every `LOG_EVERY` steps, so that
a step never waits for the host.

Rejected: `transformers.Trainer`. It owns the model call, the data loader and the logging; a phase here switches
subnets between steps, takes its targets from a teacher pass and must restart bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.checkpoint import load_training_state, save_training_state
from engine.data import Batch, EncodedDataset
from engine.objective import KDLoss
from engine.optim import build_optimizer, linear_schedule
from engine.settings import PhaseSettings

LOG_EVERY = 10
"""Steps between two reads of the accumulated losses."""

LOSS_TERMS = ("total", "hidden", "attention", "prediction")


class Diverged(RuntimeError):
    """The loss of a phase became NaN or infinite."""


@dataclass
class PhaseLog:
    """Mean losses since the previous log line.

    Attributes:
        phase: name of the phase.
        step: optimizer steps done.
        total_steps: optimizer steps of the phase.
        losses: mean of every loss term over the steps since the previous line.
        seconds: wall time since the phase (or its resumption) began.
    """

    phase: str
    step: int
    total_steps: int
    losses: dict[str, float]
    seconds: float


def cycle(data: EncodedDataset, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
    """Endless batches, epoch after epoch, beginning at step `start_step`."""
    per_epoch = data.num_batches(batch_size)
    epoch, offset = divmod(start_step, per_epoch)
    while True:
        yield from data.batches(batch_size, seed=seed, epoch=epoch, start_step=offset)
        epoch, offset = epoch + 1, 0


def run_phase(
    name: str,
    model: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    loss: Callable[[Batch, int], KDLoss],
    settings: PhaseSettings,
    total_steps: int,
    *,
    log: Callable[[PhaseLog], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    after_step: Callable[[int], None] | None = None,
    extra_state: Callable[[], dict[str, Tensor]] | None = None,
    restore_extra: Callable[[dict[str, Tensor]], None] | None = None,
) -> int:
    """Trains `model` for `total_steps` optimizer steps; returns the step it started from (0 unless resumed).

    Args:
        name: of the phase, for logs and messages.
        model: trained in place, left in eval mode.
        batches: `batches(step)` gives the batches from that step on.
        loss: `loss(batch, step)` runs the forward pass and returns the objective.
        settings: optimizer settings.
        total_steps: 0 does nothing.
        log: called every `LOG_EVERY` steps and at the end.
        checkpoint: file for the state inside the phase; read if present, removed by the caller when the phase's
            result is safe.
        checkpoint_every: steps between checkpoints.
        after_step: called after every step with the number of steps done, in eval or train mode as it likes;
            training mode is set again before the next step.
        extra_state, restore_extra: tensors saved and restored with the checkpoint (best weights so far, say).

    Raises:
        Diverged: a loss term became NaN or infinite.
    """
    if total_steps <= 0:
        model.eval()
        return 0
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay)
    scheduler = linear_schedule(optimizer, round(settings.warmup_ratio * total_steps), total_steps)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start, extra = load_training_state(checkpoint, model, optimizer, scheduler)
        if restore_extra is not None:
            restore_extra(extra)
    device = parameters[0].device
    sums = torch.zeros(len(LOSS_TERMS), dtype=torch.float64, device=device)
    since, began = 0, time.monotonic()
    stream = batches(start)
    for step in range(start, total_steps):
        model.train()
        terms = loss(next(stream).to(device), step)
        terms.total.backward()
        nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        sums += torch.stack([getattr(terms, t).detach().double() for t in LOSS_TERMS])
        since += 1
        done = step + 1
        if done % LOG_EVERY == 0 or done == total_steps:
            losses = dict(zip(LOSS_TERMS, (sums / since).tolist(), strict=True))
            sums.zero_()
            since = 0
            if not all(map(math.isfinite, losses.values())):
                raise Diverged(f"{name}: the loss is not finite at step {done}: {losses}")
            if log is not None:
                log(PhaseLog(name, done, total_steps, losses, time.monotonic() - began))
        if after_step is not None:
            after_step(done)
        if checkpoint is not None and done % checkpoint_every == 0 and done < total_steps:
            save_training_state(
                checkpoint, model, optimizer, scheduler, done, extra_state() if extra_state is not None else {}
            )
    model.eval()
    return start
