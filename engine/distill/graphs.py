"""The population step of one student as a captured CUDA graph, replayed for every student of its shape family.

A graph reads and writes fixed addresses, so it belongs to a `Slot`: a model whose weights, optimizer state and
learning rate stay where they are, programs in device buffers (`kernels.triton.device_program`), and, shared by all
slots, buffers for batch and teacher's answers. A student that is to be trained is seated in a free slot of its family:
its weights are copied in, and from then on its own parameters are views of the slot's, so that whoever evaluates it
sees it train; its expressions are written into the program buffers. Leaving, it takes a copy of its weights along.

    family   what a graph's kernels depend on: shapes and dtypes of all parameters, per layer the stack, inner width and
             the program's flags and slots, dropout, precision, optimizer constants, backends
    shape    of batch and answers: a slot has one graph per shape, `MAX_GRAPHS` at most; others run eagerly

The first step of a shape runs eagerly, on a side stream: it is a real step with the slot's own program buffers, and
whatever is compiled, loaded and allocated at a kernel's first run is done by it, since a capture may load nothing. The
second is captured and replayed. `captures` counts, and a student of a known family and shape adds nothing to it. Random
numbers come from the member's generator state, set before a replay as before an eager step; seeds drawn on the device
(`torch.randint`) are part of the graph.

What cannot be captured runs eagerly, on the same slot, and one line says why. `FFNAS_CUDA_GRAPHS=0` turns it off.

Rejected: one graph for all K students of a population. It would have to be captured again whenever one is retired.
Rejected: the teacher's pass in the graph. Its answers may come from a cache, and its model is the user's.

State of verification: order, buffers, counters, fall-back and seating are tested on the CPU with a stand-in that keeps
the step function and runs it at replay. On a CUDA device this has not run yet.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.data import Batch
from engine.distill.device_graph import CudaGraph, DevicePrograms, Graph, Programs
from engine.exhaustion import is_out_of_memory
from engine.states import EncoderStates
from engine.student.ffn import FFNPlan
from engine.student.modeling import FFNASPreTrainedModel
from engine.training.optim import build_optimizer, clipped_step
from engine.training.settings import PhaseSettings
from kernels import dispatch

_log = logging.getLogger("ffnas.training")

ENVIRONMENT = "FFNAS_CUDA_GRAPHS"
MAX_GRAPHS = 16
"""Graphs of one slot, and input buffers: shapes of batches beyond the first ones run eagerly."""

MAX_FREE = 16
"""Slots kept for later students; of more, the one free for longest is dropped."""

Loss = Callable[..., Any]


@dataclass
class _Inputs:
    """Fixed places of a batch and the teacher's answers."""

    batch: Batch
    targets: EncoderStates

    def tensors(self) -> list[Tensor]:
        return _batch_tensors(self.batch) + self.targets.tensors()


@dataclass
class _Captured:
    """One shape's graph of a slot, and what a step leaves: loss (float64) and whether it was left out (float32)."""

    graph: Graph
    total: Tensor
    skipped: Tensor
    warm: bool = False
    ready: bool = False


@dataclass(eq=False)
class Slot:
    """Fixed places of a student."""

    family: Hashable
    model: FFNASPreTrainedModel
    programs: Programs
    settings: PhaseSettings
    lr: Tensor
    graphs: dict[Hashable, _Captured] = field(default_factory=dict)
    tenant: FFNASPreTrainedModel | None = None
    steps: int = 0
    eager: bool = False

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        capturable = self.lr.is_cuda
        self.optimizer = build_optimizer(
            self.model, lr=self.lr, weight_decay=self.settings.weight_decay, capturable=capturable
        )

    def seat(self, tenant: FFNASPreTrainedModel, plans: Sequence[FFNPlan]) -> None:
        """Gives the slot to a student, as it is now; the optimizer starts anew."""
        self.programs.load(plans)
        self.model.base_model.planner.full = self.programs.plans
        with torch.no_grad():
            for place, given in zip(self.model.parameters(), tenant.parameters(), strict=True):
                place.copy_(given)
                given.data = place.data
            for buffer, wanted in zip(self.model.buffers(), tenant.buffers(), strict=True):
                buffer.copy_(wanted)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.tenant, self.steps = tenant, 0

    def vacate(self) -> None:
        """The student takes its weights along."""
        assert self.tenant is not None
        for parameter in self.tenant.parameters():
            parameter.data = parameter.data.clone()
        self.tenant = None


class StepGraphs:
    """Slots and their graphs; one for all populations that one `Distiller` trains.

    Args:
        device: where the students are.
        loss: `loss(part)` gives the objective, called as `loss(part)(model, batch, targets=targets)`.
        constants: whatever else the step depends on, hashable.
        graph: makes an empty graph.
        programs: `programs(plans, device)` makes a slot's programs; it also has `family(plan)`.

    Attributes:
        captures: graphs captured so far.
        replays: steps that were replays.
    """

    def __init__(
        self,
        device: torch.device,
        loss: Callable[[str], Loss],
        constants: Hashable = (),
        *,
        graph: Callable[[], Graph] = CudaGraph,
        programs: Any = DevicePrograms,
    ) -> None:
        self.device = device
        self.captures = 0
        self.replays = 0
        self._loss, self._constants = loss, constants
        self._graph, self._programs = graph, programs
        self._slots: list[Slot] = []
        self._inputs: dict[Hashable, _Inputs] = {}
        self._filled: tuple[Batch, EncoderStates, Hashable] | None = None
        self._said: set[str] = set()

    def seat(self, model: FFNASPreTrainedModel, settings: PhaseSettings, part: str) -> Slot | None:
        """A slot for a student that starts training, or None: it has no plan (not one of our models)."""
        planner = getattr(getattr(model, "base_model", None), "planner", None)
        if planner is None:
            self._say("the student is not an ffnas model")
            return None
        plans = planner.full
        key = self._family(model, plans, settings, part)
        slot = next((s for s in self._slots if s.tenant is None and s.family == key), None)
        if slot is None:
            lr = torch.zeros((), dtype=torch.float32, device=self.device)
            own = copy.deepcopy(model).train()
            slot = Slot(key, own, self._programs(plans, self.device), settings, lr)
            self._slots.append(slot)
        slot.seat(model, plans)
        return slot

    def leave(self, slot: Slot) -> None:
        """The slot's student is done, or out."""
        slot.vacate()
        self._filled = None
        self._slots.remove(slot)
        self._slots.append(slot)  # the last to be dropped
        free = [s for s in self._slots if s.tenant is None]
        for old in free[: max(0, len(free) - MAX_FREE)]:
            self._slots.remove(old)

    def step(
        self, slot: Slot, part: str, batch: Batch, targets: EncoderStates, lr: float
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One update of the slot's student: (loss float64, 1 where the step was left out), scalars on the device.

        Raises:
            RuntimeError: memory ran out; free slots are dropped, the student is as it was before the step.
        """
        slot.lr.fill_(lr)
        try:
            done = self._captured_step(slot, part, batch, targets)
            if done is None:
                done = self._run(slot, part, batch, targets)
        except (RuntimeError, MemoryError) as error:
            slot.optimizer.zero_grad(set_to_none=True)
            if slot.steps == 0:  # moments are made at the first step: some of them may be
                slot.optimizer.state.clear()
                slot.graphs.clear()
            if is_out_of_memory(error):
                self._slots = [s for s in self._slots if s.tenant is not None]
                slot.graphs.clear()
            raise
        slot.steps += 1
        return done

    def _captured_step(
        self, slot: Slot, part: str, batch: Batch, targets: EncoderStates
    ) -> tuple[Tensor, Tensor] | None:
        """The step by a graph, or the eager first one of a shape; None where there is no graph to be had."""
        if slot.eager or os.environ.get(ENVIRONMENT) == "0":
            return None
        shape = self._fill(batch, targets)
        if shape is None:
            return None
        inputs = self._inputs[shape]
        known = slot.graphs.get(shape)
        if known is None:
            known = slot.graphs[shape] = _Captured(
                self._graph(),
                torch.zeros((), dtype=torch.float64, device=self.device),
                torch.zeros((), dtype=torch.float32, device=self.device),
            )

        def run() -> None:
            total, skipped = self._run(slot, part, inputs.batch, inputs.targets)
            known.total.copy_(total)
            known.skipped.copy_(skipped)

        if not known.warm:
            known.graph.warm(run)
            known.warm = True
        else:
            if not known.ready and not self._capture(slot, known, run):
                return None
            known.graph.replay()
            self.replays += 1
        return known.total.clone(), known.skipped.clone()

    def _capture(self, slot: Slot, known: _Captured, run: Callable[[], None]) -> bool:
        try:
            known.graph.capture(run)
        except RuntimeError as error:
            slot.optimizer.zero_grad(set_to_none=True)
            if is_out_of_memory(error):
                raise
            slot.eager = True
            slot.graphs.clear()
            self._say(str(error).strip().split("\n")[0])
            return False
        known.ready = True
        self.captures += 1
        return True

    def _run(self, slot: Slot, part: str, batch: Batch, targets: EncoderStates) -> tuple[Tensor, Tensor]:
        terms = self._loss(part)(slot.model, batch, targets=targets)
        terms.total.backward()
        skipped = clipped_step(slot.optimizer, slot.parameters, slot.settings.clip)
        slot.optimizer.zero_grad(set_to_none=True)
        return terms.total.detach().double(), skipped

    def _fill(self, batch: Batch, targets: EncoderStates) -> Hashable | None:
        """Copies into the buffers of this shape, once for all students of a step; its key, None for one too many."""
        last = self._filled
        if last is not None and last[0] is batch and last[1] is targets:
            return last[2]
        given = _batch_tensors(batch) + targets.tensors()
        shape = tuple((t.shape, t.stride(), t.dtype) for t in given)
        if shape not in self._inputs:
            if len(self._inputs) >= MAX_GRAPHS:
                self._say(f"batches have more than {MAX_GRAPHS} shapes; the others")
                return None
            self._inputs[shape] = _Inputs(batch.map(torch.clone), targets.map(torch.clone))
        else:
            for place, value in zip(self._inputs[shape].tensors(), given, strict=True):
                place.copy_(value, non_blocking=True)
        self._filled = (batch, targets, shape)
        return shape

    def _family(
        self, model: FFNASPreTrainedModel, plans: Sequence[FFNPlan], settings: PhaseSettings, part: str
    ) -> Hashable:  # fmt: skip
        config = model.config
        parameters = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters())
        layers = tuple((p.stack, p.inner, p.kron, self._programs.family(p)) for p in plans)
        rates = [getattr(config, f"{n}_dropout_prob") for n in ("hidden", "attention_probs")]
        numbers = (*rates, getattr(config, "classifier_dropout", None), config.layer_norm_eps)
        attention = (config.num_attention_heads, config._attn_implementation)
        constants = (self._constants, part, settings.weight_decay, settings.clip, dispatch.fingerprint())
        return type(model), parameters, layers, numbers, attention, constants

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("population: steps run eagerly, without a CUDA graph: %s", reason)


def _batch_tensors(batch: Batch) -> list[Tensor]:
    seen: list[Tensor] = []
    batch.map(lambda t: seen.append(t) or t)  # type: ignore[func-returns-value]
    return seen
