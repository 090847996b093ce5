"""Stage 3's supernet distilled over several tasks (`data.tasks`), one task a step, each with a teacher of its own.

Teachers are fine-tuned once, found in the cache ever after, and stay in memory: a step loads nothing.

Source: EfficientBERT, section 3.3 (eight tasks of GLUE, candidates scored on MNLI). Its code read the task's teacher
from disk at every step.
"""

from __future__ import annotations

from engine.data import EncodedDataset
from engine.data.mixture import TaskMixture
from engine.distill import Distiller
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.multitask import MultiTaskStudent
from engine.teacher import Teacher
from engine.teacher.finetune import finetune
from kernels.cache import cache_dir
from search.console.progress import Reporter
from search.context import Context, Prepared


def teach_others(prepared: Prepared, reporter: Reporter) -> dict[str, Teacher]:
    """A fine-tuned teacher for each of the other tasks."""
    teachers = {}
    for name, data in prepared.others.items():
        with reporter.phase(f"teacher {name}", 1) as bar:
            teachers[name] = finetune(
                prepared.config.teacher,
                data,
                prepared.config.finetune,
                cache_dir=cache_dir() / "teachers",
                device=prepared.device,
                precision=prepared.config.teacher_precision,
                progress=lambda done, total, bar=bar, **_: bar.update(done, "", total=total),
                published=prepared.config.kd.paper_exact,
            )
    return teachers


def share_teachers(ctx: Context) -> dict[str, Teacher]:
    """`teach_others` on the first rank; the others take over the weights."""
    tuned = ctx.ranks.first(lambda: teach_others(ctx, ctx.reporter))
    if tuned is None:
        load = {"device": ctx.device, "seed": ctx.config.seed, "published": ctx.config.kd.paper_exact}
        tuned = {name: Teacher.load(ctx.config.teacher, data.spec, **load) for name, data in ctx.others.items()}
    for teacher in tuned.values():
        ctx.ranks.spread(teacher.model)
    return tuned


class TaskDistillers:
    """The objective of each task; teachers are brought in at the first use and kept.

    Args:
        ctx: the run.
    """

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        self._made: dict[str, Distiller] = {}

    def load(self) -> None:
        """Fine-tunes or finds all teachers."""
        own = self.ctx.distiller(stage=True)
        self._made = {self.ctx.spec.name: own}
        for name, teacher in share_teachers(self.ctx).items():
            spec = self.ctx.others[name].spec
            precisions = (own.precision, own.teacher_precision)
            self._made[name] = Distiller(
                teacher, self.ctx.shape.num_layers, own.weights, spec, self.ctx.device, *precisions, own.layers
            )

    def of(self, task: str) -> Distiller:
        """The distiller of a task."""
        if not self._made:
            self.load()
        return self._made[task]


def several_heads(ctx: Context, supernet: FFNASPreTrainedModel) -> MultiTaskStudent:
    """The supernet with a head for each task, those of the other tasks freshly initialised."""
    largest = supernet.config.full_architecture
    others = {name: ctx.new_student(largest, f"stage3-head {name}", data.spec) for name, data in ctx.others.items()}
    return MultiTaskStudent(supernet, ctx.spec.name, others)


def all_training_data(ctx: Context) -> EncodedDataset | TaskMixture:
    """Training rows of all tasks of stage 3."""
    if not ctx.others:
        return ctx.data.train
    return TaskMixture({ctx.spec.name: ctx.data.train, **{name: data.train for name, data in ctx.others.items()}})
