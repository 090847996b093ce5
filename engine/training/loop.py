"""The training loop: one phase of optimizer steps over a deterministic order of batches, resumable at any step.

Batch k of epoch e is a function of (seed, e, k), so a checkpoint holds only model, optimizer, step and generator state.
Losses are summed on the device and read every `LOG_EVERY` steps, on CUDA without waiting (`engine.training.readout`).

A step's batch may be worked through in parts, one after the other (`PhaseSettings.accumulate`) and beside one another
(ranks); the sum of the parts' losses is the loss of the whole batch (`engine.data.parts`). So N ranks train what one
does, up to rounding; each rank and part draws its own dropout. Why no library's loop: docs/decisions/0020.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.data import Batch
from engine.data.parts import Part, split
from engine.data.prefetch import prefetch
from engine.loss_terms import LOGGED, TERMS
from engine.objective import KDLoss, KDWeights
from engine.training.checkpoint import has_training_state, load_training_state, save_training_state
from engine.training.optim import TrainingSteps
from engine.training.parallel import ALONE, Ranks, accumulating
from engine.training.readout import Readout
from engine.training.sentinel import Sentinel
from engine.training.settings import PhaseSettings

_log = logging.getLogger("ffnas.training")

LOG_EVERY = 10
"""Steps between two reads of the accumulated losses."""


class Diverged(RuntimeError):
    """The loss of a phase, or the gradients of many steps in a row, became NaN or infinite."""


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


class Batched(Protocol):
    """What a phase trains on: `EncodedDataset`, and what stands for it."""

    def num_batches(self, batch_size: int) -> int:
        """Batches of an epoch."""

    def batches(self, batch_size: int, *, seed: int, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of one epoch from step `start_step` on."""


def cycle(data: Batched, batch_size: int, *, seed: int, start_step: int = 0) -> Iterator[Batch]:
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
    weights: KDWeights | None = None,
    ranks: Ranks = ALONE,
    sentinel: Sentinel | None = None,
) -> int:
    """Trains `model` for `total_steps` optimizer steps; returns the step it started from (0 unless resumed).

    Args:
        name: of the phase, for logs and messages; its last word says what it trains on.
        model: trained in place, left in eval mode.
        batches: `batches(step)` gives the batches from that step on, the same on every rank.
        loss: `loss(batch, step)` runs the forward pass and returns the objective. Where a step has several parts it is
            called for each (`batch.part` tells which); all must use the same parameters.
        settings: optimizer settings.
        total_steps: 0 does nothing.
        log: called every `LOG_EVERY` steps and at the end.
        checkpoint: file for the state inside the phase; read if present, removed by the caller when the phase's
            result is safe. Only the first rank reads and writes it.
        checkpoint_every: steps between checkpoints.
        after_step: called after every step with the number of steps done, in eval or train mode as it likes;
            training mode is set again before the next step.
        extra_state, restore_extra: tensors saved and restored with the checkpoint (best weights so far, say).
        weights: of the loss's terms, needed to weigh parts term by term; without them every term must be a mean over
            sequences. Theirs is also the learning rate: the published one under `paper_exact`.
        ranks: processes that train together; `log`, `after_step` and the two above are called on the first only.
        sentinel: compares backends on the first batch (of a short phase not always).

    Raises:
        Diverged: a loss term became NaN or infinite, or every step between two log lines had gradients that did
            (single ones are left out, see `engine.training.optim.clipped_step`).
    """
    if total_steps <= 0:
        model.eval()
        return 0
    published = weights is not None and weights.paper_exact
    steps = TrainingSteps(model, settings, total_steps, published=published)
    start = 0
    if checkpoint is not None and ranks.agree(lambda: has_training_state(checkpoint)):
        start, extra = load_training_state(checkpoint, model, steps.optimizer, steps.scheduler, ranks=ranks)
        if start and restore_extra is not None and ranks.is_first:
            restore_extra(extra)
    device = steps.parameters[0].device
    losses = _LossLog(name, total_steps, device, ranks, log)
    stream = prefetch(_parts(batches(start), total_steps - start, settings.accumulate, ranks), device)
    with ranks.data_parallel(_Objective(model, loss, weights)) as objective:
        for step in range(start, total_steps):
            model.train()
            last = False
            while not last:
                part = next(stream)
                last = part.last
                if sentinel is not None:
                    check = partial(loss, part.batch, step)
                    sentinel.training(name, model, check, kind=name.rpartition(" ")[2], steps=total_steps)
                    sentinel = None
                with accumulating(objective, more=not last):
                    total, terms = objective(part, step)
                    (total if ranks.size == 1 else total * ranks.size).backward()
                losses.sums += terms
            done = step + 1
            losses.after_step(done, steps.take())
            saves = checkpoint is not None and done % checkpoint_every == 0 and done < total_steps
            if saves or done == total_steps or device.type != "cuda":
                losses.settle()
            if after_step is not None and ranks.is_first:
                after_step(done)
            if saves and checkpoint is not None:
                extra = extra_state() if extra_state is not None and ranks.is_first else {}
                save_training_state(checkpoint, model, steps.optimizer, steps.scheduler, done, extra, ranks=ranks)
    model.eval()
    return start


class _LossLog:
    """Sums the loss terms from one log line to the next; the device is read when the next line is due, or when asked.

    Args: of the phase, as of `run_phase`.
    """

    def __init__(
        self,
        phase: str,
        total_steps: int,
        device: torch.device,
        ranks: Ranks,
        log: Callable[[PhaseLog], None] | None,
    ) -> None:
        self.phase, self.total_steps, self.ranks = phase, total_steps, ranks
        self.log = log if ranks.is_first else None
        self.sums = torch.zeros(len(LOGGED), dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), device=device)
        self.since, self.began = 0, time.monotonic()
        self.pending: _Losses | None = None

    def after_step(self, done: int, skipped: Tensor) -> None:
        """Counts a step; asks the device for the means where a line is due."""
        self.skipped += skipped
        self.since += 1
        if done % LOG_EVERY and done < self.total_steps:
            return
        self.settle()
        values = Readout(torch.cat([self.ranks.sum(self.sums) / self.since, self.skipped.double()[None]]))
        seconds = time.monotonic() - self.began
        self.pending = _Losses(self.phase, done, self.total_steps, self.since, values, seconds)
        self.sums.zero_()
        self.skipped.zero_()
        self.since = 0

    def settle(self) -> None:
        """Logs what was asked for; raises `Diverged` where that is not finite."""
        if self.pending is not None:
            self.pending.judge(self.log)
            self.pending = None


@dataclass
class _Losses:
    """Mean losses of the `since` steps up to `step`, and how many were left out; perhaps still on their way."""

    phase: str
    step: int
    total_steps: int
    since: int
    values: Readout
    seconds: float

    def judge(self, log: Callable[[PhaseLog], None] | None) -> None:
        """Logs them. Raises `Diverged` where they, or the gradients of all these steps, are not finite."""
        *means, left_out = self.values.wait()
        losses = dict(zip(LOGGED, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise Diverged(f"{self.phase}: the loss is not finite at step {self.step}: {losses}")
        if left_out:
            if left_out == self.since:
                raise Diverged(
                    f"{self.phase}: the gradients are not finite in {self.since} steps up to step {self.step}"
                )
            message = "%s: gradients not finite in %d of %d steps, left out"
            _log.warning(message, self.phase, left_out, self.since)
        if log is not None:
            log(PhaseLog(self.phase, self.step, self.total_steps, losses, self.seconds))


def _parts(batches: Iterator[Batch], steps: int, accumulate: int, ranks: Ranks) -> Iterator[Part]:
    """This rank's parts of `steps` batches."""
    for batch in itertools.islice(batches, steps):
        yield from split(batch, rank=ranks.rank, ranks=ranks.size, micro_batches=accumulate)


class _Objective(nn.Module):
    """The loss as a module around the model it trains, which is what data parallelism wraps."""

    def __init__(
        self, model: nn.Module, loss: Callable[[Batch, int], KDLoss], weights: KDWeights | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.weights = weights

    def forward(self, part: Part, step: int) -> tuple[Tensor, Tensor]:
        """What to differentiate (a scalar), and `LOGGED` as float64 without gradient, both weighed by share."""
        loss = self.loss(part.batch, step)
        terms: tuple[Tensor, ...] = tuple(getattr(loss, term.name) for term in TERMS)
        total = loss.total
        if not part.whole:
            terms, total = self._weighed(terms, total, part)
        return total, torch.stack([t.detach().double() for t in (total, *terms)])

    def _weighed(self, terms: tuple[Tensor, ...], total: Tensor, part: Part) -> tuple[tuple[Tensor, ...], Tensor]:
        weights = self.weights
        if weights is None or weights.paper_exact:  # paper_exact: means over padded positions, of which rows have alike
            return tuple(t * part.rows for t in terms), total * part.rows
        shares = [getattr(part, term.unit) for term in TERMS]
        factors = [getattr(weights, term.name) for term in TERMS]
        terms = tuple(t * share for t, share in zip(terms, shares, strict=True))
        return terms, sum(
            (t * factor for t, factor in zip(terms, factors, strict=True) if factor > 0), start=total.new_zeros(())
        )
