"""The population step: one batch, one teacher pass, K students with their own weights, optimizers and schedules.

    step(batch):  targets = teacher(batch);   per student:  loss -> backward -> clip -> AdamW -> schedule

What one student goes through is, operation by operation, what `engine.training.loop.run_phase` would do to it alone,
with its own random numbers, so its weights and score do not depend on who else is in the population.

On the CPU students run side by side, one thread group each (`workers`): a step of a small student keeps two threads
busy half of the time, two students keep them busy. The threads per student depend on the settings alone, never on how
many students happen to be left, because the order in which a gradient is summed does.
On CUDA they run one after the other on the same stream, which the device sees as one long queue of work, each as a
captured graph (`engine.distill.graphs`); batches are copied there one ahead (`engine.data.prefetch`).

A student whose loss is not finite is retired and the others go on. On CUDA nobody waits to hear of it: the losses of
`LOG_EVERY` steps are read when the next ones are (`engine.training.readout`), so it may train that much longer, for
nothing. When memory runs out, the youngest students are taken out (`postponed`, to be trained again later) and the step
goes on where it was: a student is only changed by its optimizer step, which comes after everything that allocates.

Rejected: stacking the students' weights into batched products. They differ in widths, depth and expression; padding
them to one shape computes up to 16 times what is asked for.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from engine.data import Batch
from engine.data.parts import Part as BatchPart
from engine.data.prefetch import prefetch
from engine.distill.distiller import Distiller
from engine.distill.graphs import Slot, StepGraphs
from engine.exhaustion import free_memory, is_out_of_memory
from engine.states import EncoderStates
from engine.student.modeling import FFNASPreTrainedModel
from engine.training.loop import LOG_EVERY
from engine.training.optim import TrainingSteps
from engine.training.readout import Readout
from engine.training.settings import PhaseSettings

Part = Literal["text", "task"]


@dataclass
class Member:
    """One student of a population.

    Args:
        model: trained in place.
        rng: state of PyTorch's generator its training starts from (`generator_state`); None takes the current one.
    """

    model: FFNASPreTrainedModel
    rng: Tensor | None = None
    reason: str | None = None
    postponed: bool = False
    _loss: Tensor | None = None
    _skipped: Tensor | None = None

    def unread(self) -> Tensor:
        """float64 [2]: the sum of its losses, and the number of steps left out, since they were last read."""
        assert self._loss is not None
        assert self._skipped is not None
        return torch.stack([self._loss, self._skipped.double()])

    @property
    def alive(self) -> bool:
        """Whether the member still trains."""
        return self.reason is None and not self.postponed


@dataclass(frozen=True)
class Outcome:
    """How the training of a member ended.

    Attributes:
        state: "done", "failed" (see `reason`), or "postponed" for lack of memory: train it again in a smaller
            population, from its first weights.
        reason: why it failed.
    """

    state: Literal["done", "failed", "postponed"]
    reason: str | None = None


def generator_state(device: torch.device) -> Tensor:
    """State of the generator that dropout on `device` draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


class PopulationStep:
    """Trains K students on the same batches, each step with one teacher pass.

    Args:
        distiller: teacher, layer map and objective.
        members: the students, oldest first.
        settings: optimizer settings, the same for all.
        total_steps: of the phase.
        part: "text" (hidden states and attention scores) or "task" (all terms).
        targets: `targets(step, batch)` gives the teacher's answers; None runs the teacher.
        workers: students that run at the same time; 1 always on CUDA, and where a student uses dropout (its random
            numbers come from a generator that all threads share).
        threads: intra-op threads of each worker.
    """

    def __init__(
        self,
        distiller: Distiller,
        members: Sequence[Member],
        settings: PhaseSettings,
        total_steps: int,
        part: Part,
        *,
        targets: Callable[[int, Batch], EncoderStates] | None = None,
        workers: int = 1,
        threads: int | None = None,
    ) -> None:
        self.distiller = distiller
        self.members = list(members)
        self.settings = settings
        self.part = part
        self.targets = targets or (lambda _, batch: distiller.targets(batch, need_logits=part == "task"))
        self.threads = threads
        self.device = distiller.device
        parallel = self.device.type == "cpu" and workers > 1 and not any(uses_dropout(m.model) for m in members)
        self.workers = workers if parallel else 1
        exact = distiller.weights.paper_exact
        self._states = [_Optimized(m, settings, total_steps, exact) for m in self.members]
        for member in self.members:
            if member.rng is None:
                member.rng = generator_state(self.device)
        self._pool: ThreadPoolExecutor | None = None
        self.graphs: StepGraphs | None = distiller.graphs
        self._reading: tuple[list[Member], Readout, int, int] | None = None

    def __enter__(self) -> PopulationStep:
        if self.workers > 1:
            self._pool = ThreadPoolExecutor(self.workers, "ffnas-student", torch.set_num_threads, (self.threads or 1,))
        return self

    def __exit__(self, *_: object) -> None:
        for state in self._states:
            state.leave(self.graphs)
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
            torch.set_num_threads(torch.get_num_threads())  # a worker's call also reached libraries' global settings

    def __call__(self, batch: Batch, step: int) -> None:
        """One teacher pass and one update of every living member."""
        batch = batch.to(self.device)
        targets = self._with_room(lambda: self.targets(step, batch))
        living = [(m, s) for m, s in zip(self.members, self._states, strict=True) if m.alive]
        if self._pool is None:
            for member, state in living:
                if member.alive:  # an older one may have needed its memory
                    self._with_room(partial(self._update, member, state, batch, targets), member)
            return
        futures = []
        for member, state in living:
            futures.append((member, state, self._submit(member, state, batch, targets)))
        without = [(m, s) for m, s, future in futures if not self._had_room(future)]
        # Each of those has its turn again, alone, the oldest first; `_with_room` makes the younger ones wait.
        for member, state in without:
            if member.alive:
                self._with_room(partial(self._wait_for, member, state, batch, targets), member)

    def _submit(self, member: Member, state: _Optimized, batch: Batch, targets: EncoderStates) -> Future[None]:
        context = contextvars.copy_context()  # the forced backend, if any
        assert self._pool is not None
        return self._pool.submit(context.run, self._update, member, state, batch, targets)

    def _wait_for(self, member: Member, state: _Optimized, batch: Batch, targets: EncoderStates) -> None:
        self._submit(member, state, batch, targets).result()

    @staticmethod
    def _had_room(future: Future[None]) -> bool:
        error = future.exception()
        if error is not None and not is_out_of_memory(error):
            raise error
        return error is None

    def retire_diverged(self, name: str, done: int, *, last: bool = True) -> None:
        """Retires members whose loss, or the gradients of every step, since the call before were not finite.

        The device is read once for all and not waited for: what is not there yet is judged at the next call, or now if
        this is the last.
        """
        self._judge(name)
        living = [m for m in self.members if m.alive and m._loss is not None]
        if living:
            values = torch.stack([m.unread() for m in living])
            self._reading = (living, Readout(values), done, (done - 1) % LOG_EVERY + 1)
            for member in living:
                member._loss = member._skipped = None
        if self._reading is not None and (last or self._reading[1].ready()):
            self._judge(name)

    def _judge(self, name: str) -> None:
        """Retires by the losses that were asked for last."""
        if self._reading is None:
            return
        members, values, done, since = self._reading
        self._reading = None
        for member, (loss, skipped) in zip(members, values.wait(), strict=True):
            what = "loss is" if not math.isfinite(loss) else "gradients are" if skipped >= since else None
            if what is not None and member.alive:
                member.reason = f"{name}: the {what} not finite at step {done}"
                self._release(member)

    def _update(self, member: Member, state: _Optimized, batch: Batch, targets: EncoderStates) -> None:
        own_generator = self._pool is None  # threads share the generator, and then nobody uses it
        if own_generator:
            outside = generator_state(self.device)
            assert member.rng is not None  # since this object was made
            _set_generator_state(self.device, member.rng)
        try:
            member.model.train()
            if self.graphs is not None and state.seat(self.graphs, self.part) and state.slot is not None:
                total, skipped = self.graphs.step(state.slot, self.part, batch, targets, state.steps.rate(state.done))
            else:
                total, skipped = self._eager_update(member.model, state, batch, targets)
            if own_generator:
                member.rng = generator_state(self.device)
        finally:
            if own_generator:
                _set_generator_state(self.device, outside)
        state.done += 1
        member._loss = total if member._loss is None else member._loss + total
        member._skipped = skipped if member._skipped is None else member._skipped + skipped

    def _eager_update(
        self, model: FFNASPreTrainedModel, state: _Optimized, batch: Batch, targets: EncoderStates
    ) -> tuple[Tensor, Tensor]:
        """(loss, float64; 1 where the step was left out)."""
        loss = self.distiller.text_loss if self.part == "text" else self.distiller.task_loss
        fresh = not state.steps.optimizer.state
        try:
            terms = loss(model, batch, targets=targets)
            terms.total.backward()
            skipped = state.steps.take()
        except (RuntimeError, MemoryError):
            state.steps.forget_gradients()
            if fresh:  # its moments are made at the first step: some of them may be
                state.steps.optimizer.state.clear()
            raise
        return terms.total.detach().double(), skipped

    def _with_room(self, run: Callable[[], EncoderStates | None], keep: Member | None = None) -> EncoderStates:
        """Runs, postponing the youngest living member and trying again as long as memory runs out.

        A member that does not fit alone fails with the reason "out of memory".
        """
        while True:
            try:
                return run()  # type: ignore[return-value]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                others = [m for m in self.members if m.alive and m is not keep]
                if not others:
                    if keep is None:
                        raise
                    keep.reason = "out of memory"
                    self._release(keep)
                    return None  # type: ignore[return-value]
                others[-1].postponed = True
                self._release(others[-1])
            free_memory()

    def _release(self, member: Member) -> None:
        """Frees a member's optimizer state and gradients; its model is the caller's."""
        state = self._states[self.members.index(member)]
        state.leave(self.graphs)
        state.steps.forget_gradients()
        state.steps.optimizer.state.clear()


@dataclass
class _Optimized:
    """Optimizer and schedule of one member, as `run_phase` makes them, or its seat among captured steps.

    `published`: with the published code's learning rates.
    """

    member: Member
    settings: PhaseSettings
    total_steps: int
    published: bool = False
    steps: TrainingSteps = field(init=False)
    done: int = 0
    slot: Slot | None = None

    def __post_init__(self) -> None:
        self.steps = TrainingSteps(self.member.model, self.settings, self.total_steps, published=self.published)

    def seat(self, graphs: StepGraphs, part: str) -> bool:
        """Whether the member has a slot, taken before its first step."""
        if self.slot is None and self.done == 0:
            self.slot = graphs.seat(self.member.model, self.settings, part)
        return self.slot is not None

    def leave(self, graphs: StepGraphs | None) -> None:
        """Gives the slot back."""
        if self.slot is not None and graphs is not None:
            graphs.leave(self.slot)
            self.slot = None


def side_by_side(population: int, device: torch.device) -> tuple[int, int]:
    """(workers, threads of each) for populations of at most `population` students on `device`.

    A function of the setting and the machine, not of how many students there are at the moment: see the module.
    """
    threads = torch.get_num_threads()
    workers = min(population, threads) if device.type == "cpu" else 1
    return workers, threads // workers


def uses_dropout(model: nn.Module) -> bool:
    """Whether training draws random numbers."""
    config = getattr(model, "config", None)
    rates = [getattr(config, n, 0.0) for n in ("hidden_dropout_prob", "attention_probs_dropout_prob")]
    head = getattr(config, "classifier_dropout", None)
    return any(rate > 0 for rate in [*rates, head or 0.0]) or any(
        isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()
    )


def train_population(
    name: str,
    members: Sequence[Member],
    batches: Iterator[Batch],
    distiller: Distiller,
    settings: PhaseSettings,
    total_steps: int,
    part: Part,
    *,
    targets: Callable[[int, Batch], EncoderStates] | None = None,
    workers: int = 1,
    threads: int | None = None,
    after_step: Callable[[int], None] | None = None,
) -> list[Outcome]:
    """Trains all members for `total_steps` on `batches`; models are left in eval mode.

    Args: as of `PopulationStep`; `name` for messages; `after_step` is called with the number of steps done, and may
        end a member's training by giving it a reason. Members that failed before are left alone.

    Returns:
        One outcome per member.
    """
    if total_steps > 0:
        step = PopulationStep(
            distiller, members, settings, total_steps, part, targets=targets, workers=workers, threads=threads
        )
        ahead = prefetch((BatchPart(batch) for batch in batches), step.device)
        with step:
            for number in range(total_steps):
                if not any(m.alive for m in members):
                    break
                step(next(ahead).batch, number)
                done = number + 1
                if done % LOG_EVERY == 0 or done == total_steps:
                    step.retire_diverged(name, done, last=done == total_steps)
                if after_step is not None:
                    after_step(done)
    outcomes = []
    for member in members:
        member.model.eval()
        state = "postponed" if member.postponed else "done" if member.reason is None else "failed"
        outcomes.append(Outcome(state, member.reason))  # type: ignore[arg-type]
    return outcomes
