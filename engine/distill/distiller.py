"""Distillation of one student (or subnet) from one teacher: the teacher pass, the student pass, the objective.

Rejected: running the teacher inside every candidate's step. For the demo's shapes the teacher's forward costs more
than the student's forward and backward together, so the steps here take its answers as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from engine.architecture.architecture import Architecture
from engine.autocast import autocast
from engine.data import Batch, TaskSpec
from engine.distill.graphs import StepGraphs
from engine.distill.mixed import mixed_states
from engine.loss_terms import LOGGED, TASK_TERMS, TEXT_TERMS
from engine.objective import KDLoss, KDWeights, kd_loss, layer_map
from engine.states import EncoderStates
from engine.student.attention import TeacherHeads
from engine.student.modeling import FFNASPreTrainedModel

if TYPE_CHECKING:
    from engine.teacher import Teacher


class Distiller:
    """Teacher, layer map and objective for students of one depth.

    Args:
        teacher: a loaded teacher; its head answers the task when `spec` is given.
        num_layers: the student's number of layers L; student layer l matches teacher layer (l+1)·(L_t/L) − 1.
        weights: weights of the objective.
        spec: the task, for the prediction term.
        device: where both models run.
        precision: of the student, `"fp32"` or `"bf16"` (autocast, for the projection of the hidden-state loss, too;
            differences and sums of losses in fp32).
        teacher_precision: of the teacher, likewise.
        layers: the teacher's layers that the student's match, None for `layer_map`.

    Attributes:
        graphs: captured steps of its students, on CUDA.
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
        layers: Sequence[int] | None = None,
    ) -> None:
        self.teacher = teacher
        self.layers = layer_map(num_layers, teacher.num_layers) if layers is None else list(layers)
        self.weights = weights
        self.spec = spec
        self.device = device
        self.precision = precision
        self.teacher_precision = teacher_precision
        self.graphs: StepGraphs | None = None
        if device.type == "cuda":
            self.graphs = StepGraphs(device, self.loss_of, (precision, weights, tuple(self.layers)))

    def loss_of(self, part: str) -> Callable[..., KDLoss]:
        """The loss of a part of training: "text" or "task"."""
        return self.text_loss if part == "text" else self.task_loss

    def targets(self, batch: Batch, *, need_logits: bool) -> EncoderStates:
        """One teacher pass over `batch`: mapped layers only."""
        return self.teacher.states(batch, self.layers, need_logits=need_logits, bf16=self.teacher_precision == "bf16")

    def text_loss(
        self,
        student: FFNASPreTrainedModel,
        batch: Batch,
        *,
        architecture: Architecture | None = None,
        targets: EncoderStates | None = None,
    ) -> KDLoss:
        """Hidden-state and attention-score distillation on a batch of plain text."""
        return self._loss(student, batch, TEXT_TERMS, architecture, targets)

    def task_loss(
        self,
        student: FFNASPreTrainedModel,
        batch: Batch,
        *,
        architecture: Architecture | None = None,
        targets: EncoderStates | None = None,
    ) -> KDLoss:
        """All terms on a batch of the task."""
        return self._loss(student, batch, TASK_TERMS, architecture, targets)

    def mixed_loss(
        self,
        supernet: FFNASPreTrainedModel,
        batch: Batch,
        architectures: Sequence[Architecture],
        *,
        task: bool,
        average: bool = True,
        targets: EncoderStates | None = None,
    ) -> KDLoss:
        """Loss of several subnets of one supernet against one teacher pass (`engine.distill.mixed`).

        Args:
            supernet: with shared weights.
            batch: on the device.
            architectures: the subnets.
            task: all terms; otherwise those of plain text.
            average: mean over the subnets, otherwise their sum.
            targets: the teacher's answers; None runs the teacher.
        """
        terms = TASK_TERMS if task else TEXT_TERMS
        if targets is None:
            targets = self.targets(batch, need_logits=task)
        with autocast(self.device, self.precision):
            states = mixed_states(supernet, batch, architectures, score_targets=self.score_targets(targets, terms))
        losses = [self._objective(supernet, s, batch, targets, terms) for s in states]
        share = 1 / len(losses) if average else 1.0
        return KDLoss(**{name: share * sum(getattr(loss, name) for loss in losses) for name in LOGGED})

    def _loss(
        self,
        student: FFNASPreTrainedModel,
        batch: Batch,
        terms: tuple[str, ...],
        architecture: Architecture | None,
        targets: EncoderStates | None,
    ) -> KDLoss:
        if targets is None:
            targets = self.targets(batch, need_logits=self.needs_logits(terms))
        with autocast(self.device, self.precision):
            states = student.states(
                batch.input_ids,
                batch.attention_mask,
                batch.token_type_ids,
                architecture=architecture,
                layers=self.student_layers(student),
                score_targets=self.score_targets(targets, terms),
            )
        return self._objective(student, states, batch, targets, terms)

    def needs_logits(self, terms: tuple[str, ...]) -> bool:
        """Whether the teacher's head has to run for these terms."""
        return "prediction" in terms

    def student_layers(self, student: FFNASPreTrainedModel) -> tuple[int, ...] | None:
        """The student's layers that are compared; None: all."""
        return None

    def score_targets(self, targets: EncoderStates, terms: tuple[str, ...]) -> list[TeacherHeads] | None:
        """What a student's attention needs to compute the score loss; None where that is not asked for, or not ours."""
        if "attention" not in terms or self.weights.attention == 0 or self.weights.paper_exact:
            return None
        return list(zip(targets.queries, targets.keys, strict=True))

    def _objective(
        self,
        student: FFNASPreTrainedModel,
        states: EncoderStates,
        batch: Batch,
        targets: EncoderStates,
        terms: tuple[str, ...],
    ) -> KDLoss:
        # the projection of hidden states is a product of the student like any other; the published code's stays float32
        with autocast(self.device, "fp32" if self.weights.paper_exact else self.precision):
            return kd_loss(
                states,
                targets,
                batch.mask,
                fit_dense=student.base_model.fit_dense,
                weights=self.weights,
                labels=batch.labels,
                head=self.spec.head,
                terms=terms,
            )
