"""Which teacher and objective a phase of a run distils with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from engine.distill import Distiller
from engine.distill.inherited import InheritedDistiller, InheritWeights
from engine.objective import KDWeights, layer_map, published_stage_map

if TYPE_CHECKING:
    from search.context import Context

Part = Literal["text", "task"]


def make_distiller(ctx: Context, part: Part, *, stage: bool) -> Distiller:
    """Teacher, layer map and objective of a phase.

    Args:
        ctx: the run.
        part: on text the teacher may be the one before fine-tuning (`kd.text_teacher`).
        stage: of stages 1 to 3, whose published code matches layers in a way of its own (`kd.paper_exact`).
    """
    precisions = {"precision": ctx.precision, "teacher_precision": ctx.config.teacher_precision}
    if ctx.inherits:
        chosen = ctx.config.inherit
        terms = InheritWeights(chosen.prediction, chosen.gold, chosen.hidden, chosen.temperature)
        return InheritedDistiller(ctx.teacher, terms, ctx.spec, ctx.device, **precisions)
    kd, count = ctx.config.kd, ctx.shape.num_layers
    weights = KDWeights(
        hidden=kd.hidden,
        attention=kd.attention,
        prediction=kd.prediction,
        temperature=kd.temperature,
        paper_exact=kd.paper_exact,
    )
    teacher = ctx.text_teacher if part == "text" else ctx.teacher
    mapped = (published_stage_map if stage and kd.paper_exact else layer_map)(count, teacher.num_layers)
    return Distiller(teacher, count, weights, ctx.spec, ctx.device, **precisions, layers=mapped)
