"""The models of a run: its students, who teaches them, and what the teacher answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.architecture.architecture import Architecture
from engine.data import TaskSpec
from engine.distill import Distiller, TeacherTargets
from engine.distill.population import Part
from engine.distill.target_cache import BatchPlan, DiskTargets, PartTargets
from engine.seeding import seed_everything
from engine.student.init import draw_padding_row, init_from_teacher
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import build_student
from engine.teacher import Teacher
from engine.training.sentinel import Sentinel
from kernels.cache import cache_dir
from search.config.distillers import make_distiller
from search.config.space import student_fields
from search.console.progress import Reporter
from search.context.prepared import Prepared

MEMORY_LIMIT = 2 << 30
"""Bytes of teacher's answers kept in memory per phase."""


@dataclass
class Models(Prepared):
    """What a run makes of what it works on.

    Attributes:
        reporter: told what is noteworthy.
        proxy_targets: the teacher's answers for proxy training by what decides its batches (`search.scoring.proxy`).
    """

    reporter: Reporter
    proxy_targets: dict[tuple[object, ...], TeacherTargets] = field(default_factory=dict, kw_only=True)
    _targets: dict[str, PartTargets | DiskTargets] = field(default_factory=dict, kw_only=True)

    @property
    def inherits(self) -> bool:
        """Whether students are made of the teacher's own layers."""
        return self.config.strategy == "inherit"

    @cached_property
    def text_teacher(self) -> Teacher:
        """Who teaches on text: the teacher of the task, or the one it was before fine-tuning (`kd.text_teacher`)."""
        if self.config.kd.text_teacher == "finetuned":
            return self.teacher
        return Teacher.load(self.config.teacher, device=self.device, published=self.config.kd.paper_exact)

    def distiller(self, part: Part = "task", *, stage: bool = False) -> Distiller:
        """Teacher, layer map and objective for this run's student; on text, with the teacher for that."""
        teacher = self.text_teacher if part == "text" and not self.inherits else self.teacher
        return make_distiller(self.config, teacher, self.shape.num_layers, self.spec, self.device, stage=stage)

    @cached_property
    def sentinel(self) -> Sentinel | None:
        """Compares backends at the beginning of phases, where wanted; one for the run, which knows what it compared."""
        if not self.config.sentinel:
            return None
        return Sentinel(self.device, self.precision, self.reporter.info)

    def targets(self, name: str, *, need_logits: bool, plan: BatchPlan) -> PartTargets | DiskTargets:
        """The teacher's answers for the batches of `name`, shared by all who ask for that name in this run.

        `plan` says which batches those are; the plan of the first to ask counts.
        """
        if name not in self._targets:
            settings, distiller = self.config.targets, self.distiller("task" if need_logits else "text")
            if settings.cache == "disk":
                self._targets[name] = DiskTargets(
                    distiller,
                    need_logits=need_logits,
                    plan=plan,
                    folder=Path(settings.folder) if settings.folder else cache_dir() / "targets",
                    dtype=settings.dtype,
                    note=self.reporter.info,
                )
            else:
                limit = MEMORY_LIMIT // plan.micro_batches if settings.cache == "memory" else 0
                self._targets[name] = PartTargets(
                    lambda: TeacherTargets(distiller, need_logits=need_logits, limit_bytes=limit)
                )
        return self._targets[name]

    def new_student(
        self, architecture: Architecture, name: str, spec: TaskSpec | None = None, **fields: Any
    ) -> FFNASPreTrainedModel:
        """A student for `architecture` on the run's device, freshly initialised with the seed of `name`.

        Its head is for the run's task, or for the one given; `fields` of its configuration win over the run's.
        """
        seed_everything(self.seed(name, "init"))
        student = self.config.student
        model = build_student(
            self.shape,
            architecture,
            student.num_heads or self.teacher.num_heads,
            spec or self.spec,
            policy=self.space.policy,
            pad_token_id=self.teacher.tokenizer.pad_token_id,
            **student_fields(self.config) | fields,
        )
        if student.init == "teacher":
            init_from_teacher(model, self.teacher.model)
        if self.config.kd.paper_exact:
            draw_padding_row(model)
        return model.to(self.device)
