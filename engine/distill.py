"""Distillation of one student (or subnet) from one teacher: the teacher pass, the student pass, the objective.

`Distiller` joins them; `TeacherTargets` keeps the teacher's answers for a fixed list of batches, so that candidates
trained on the same batches share one teacher pass instead of paying one each.

Rejected: running the teacher inside every candidate's step. For the demo's shapes the teacher's forward costs more
than the student's forward and backward together.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from engine.architecture import Architecture
from engine.data import Batch, TaskSpec
from engine.objective import KDLoss, KDWeights, kd_loss, layer_map
from engine.states import EncoderStates

if TYPE_CHECKING:
    from engine.teacher import Teacher

TEXT_TERMS = ("hidden", "attention")
TASK_TERMS = ("hidden", "attention", "prediction")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """bf16 autocast on `device` when `precision` is `"bf16"`, otherwise nothing."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def states_bytes(states: EncoderStates) -> int:
    """Bytes the tensors of `states` occupy."""
    tensors = [states.embeddings, *states.hidden, *states.queries, *states.keys]
    if states.logits is not None:
        tensors.append(states.logits)
    return sum(t.numel() * t.element_size() for t in tensors)


class Distiller:
    """Teacher, layer map and objective for students of one depth.

    Args:
        teacher: a loaded teacher; its head answers the task when `spec` is given.
        num_layers: the student's number of layers L; student layer l matches teacher layer (l+1)·(L_t/L) − 1.
        weights: weights of the objective.
        spec: the task, for the prediction term.
        device: where both models run.
        precision: of the student, `"fp32"` or `"bf16"` (autocast; losses in fp32).
        teacher_precision: of the teacher, likewise.
    """

    def __init__(
        self,
        teacher: Teacher,
        num_layers: int,
        weights: KDWeights,
        spec: TaskSpec,
        device: torch.device,
        precision: str = "fp32",
        teacher_precision: str = "fp32",
    ) -> None:
        self.teacher = teacher
        self.layers = layer_map(num_layers, teacher.num_layers)
        self.weights = weights
        self.spec = spec
        self.device = device
        self.precision = precision
        self.teacher_precision = teacher_precision

    def targets(self, batch: Batch, *, need_logits: bool) -> EncoderStates:
        """One teacher pass over `batch`: mapped layers only."""
        with autocast(self.device, self.teacher_precision):
            return self.teacher.states(batch, self.layers, need_logits=need_logits)

    def text_loss(
        self,
        student: nn.Module,
        batch: Batch,
        *,
        architecture: Architecture | None = None,
        targets: EncoderStates | None = None,
    ) -> KDLoss:
        """Hidden-state and attention-score distillation on a batch of plain text."""
        return self._loss(student, batch, TEXT_TERMS, architecture, targets)

    def task_loss(
        self,
        student: nn.Module,
        batch: Batch,
        *,
        architecture: Architecture | None = None,
        targets: EncoderStates | None = None,
    ) -> KDLoss:
        """All three terms on a batch of the task; regression predicts the gold labels."""
        return self._loss(student, batch, TASK_TERMS, architecture, targets)

    def _loss(
        self,
        student: nn.Module,
        batch: Batch,
        terms: tuple[str, ...],
        architecture: Architecture | None,
        targets: EncoderStates | None,
    ) -> KDLoss:
        if targets is None:
            targets = self.targets(batch, need_logits="prediction" in terms)
        with autocast(self.device, self.precision):
            states = student.states(
                batch.input_ids, batch.attention_mask, batch.token_type_ids, architecture=architecture
            )
        return kd_loss(
            states,
            targets,
            batch.attention_mask,
            fit_dense=student.base_model.fit_dense,
            weights=self.weights,
            labels=batch.labels,
            regression=self.spec.kind == "regression",
            terms=terms,
        )


class TeacherTargets:
    """The teacher's answers for a fixed sequence of batches, computed on first use and kept while they fit.

    Args:
        distiller: whose teacher answers.
        need_logits: whether the prediction term will be used.
        limit_bytes: answers beyond this many bytes are not kept but computed again each time.
    """

    def __init__(self, distiller: Distiller, *, need_logits: bool, limit_bytes: int = 2 << 30) -> None:
        self.distiller = distiller
        self.need_logits = need_logits
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._kept: dict[int, EncoderStates] = {}

    def get(self, step: int, batch: Batch) -> EncoderStates:
        """The teacher's answer for the batch of `step`; the caller gives the same batch for the same step."""
        states = self._kept.get(step)
        if states is None:
            states = self.distiller.targets(batch, need_logits=self.need_logits)
            size = states_bytes(states)
            if self.kept_bytes + size <= self.limit_bytes:
                self._kept[step] = states
                self.kept_bytes += size
        return states
