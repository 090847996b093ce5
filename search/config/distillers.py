"""Which objective a phase of a run distils with."""

from __future__ import annotations

import torch

from engine.data import TaskSpec
from engine.distill import Distiller
from engine.distill.inherited import InheritedDistiller, InheritWeights
from engine.loss_terms import TASK_TERMS
from engine.objective import KDWeights, layer_map, published_stage_map
from engine.teacher import Teacher
from search.config.schema import SearchConfig


def make_distiller(
    config: SearchConfig,
    teacher: Teacher,
    num_layers: int,
    spec: TaskSpec,
    device: torch.device,
    *,
    stage: bool = False,
) -> Distiller:
    """Layer map and objective of a phase.

    Args:
        config: of the run, device and precisions decided.
        teacher: of the phase.
        num_layers: of the student.
        spec: the task.
        device: where models run.
        stage: of stages 1 to 3, whose published code matches layers in a way of its own (`kd.paper_exact`).
    """
    precisions = {"precision": config.precision, "teacher_precision": config.teacher_precision}
    if config.strategy == "inherit":
        chosen = config.inherit
        terms = InheritWeights(chosen.prediction, chosen.gold, chosen.hidden, chosen.temperature)
        return InheritedDistiller(teacher, terms, spec, device, **precisions)
    kd = config.kd
    chosen_weights = {name: getattr(kd, name) for name in TASK_TERMS}
    weights = KDWeights(**chosen_weights, temperature=kd.temperature, paper_exact=kd.paper_exact)
    mapped = (published_stage_map if stage and kd.paper_exact else layer_map)(num_layers, teacher.num_layers)
    return Distiller(teacher, num_layers, weights, spec, device, **precisions, layers=mapped)
