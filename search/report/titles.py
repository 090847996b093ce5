"""What a run's model is called where people read of it: its teacher, how small it is, and for what.

    all-MiniLM-L6-v2 at a quarter of its layers' size, for demo sentiment
    bert-base-uncased, made 4 times as fast, for reviews
    Student of bert-base-uncased with 15.7 M parameters, for glue/mnli

Rejected: the run directory's name. It is a date unless somebody thought of a better one, and says nothing elsewhere.
"""

from __future__ import annotations

import re

from torch import nn

from engine.data import TaskSpec
from engine.model_sources import hub_name
from search.config.schema import SearchConfig
from search.context import Prepared
from search.evidence.speed import parameters
from search.report.theme import millions

_PARTS = {1 / 2: "half", 1 / 3: "a third", 1 / 4: "a quarter", 1 / 8: "an eighth", 1 / 16: "a sixteenth"}
_NEAR = 0.03
"""Relative distance from a part that still is called it."""


def title_of(ctx: Prepared, model: nn.Module) -> str:
    """The title of the found model `model`."""
    teacher, task = teacher_name(ctx.config.teacher), task_name(ctx.config, ctx.spec)
    own, whole = parameters(model), parameters(ctx.teacher.model)
    if ctx.config.strategy != "inherit":
        return f"Student of {teacher} with {millions(own['total'])} parameters, for {task}"
    budget = ctx.config.budget
    if budget.speedup is not None:
        size = f", made {budget.speedup:g} times as fast"
    elif budget.latency_ms is not None:
        size = f", made to answer within {budget.latency_ms:g} ms"
    elif budget.total is not None:
        size = f" at {part(own['total'] / whole['total'])} of its size"
    else:
        size = f" at {part(own['encoder'] / whole['encoder'])} of its layers' size"
    return f"{teacher}{size}, for {task}"


def part(share: float) -> str:
    """A share in words: a quarter, 37 %."""
    near = min(_PARTS, key=lambda p: abs(p - share))
    return _PARTS[near] if abs(near - share) <= _NEAR * near else f"{100 * share:.2g} %"


def teacher_name(source: str) -> str:
    """The last part of a teacher's name or folder."""
    text = (hub_name(source) or source).rstrip("/\\")
    return re.split(r"[/\\:]", text)[-1] or text


def task_name(config: SearchConfig, spec: TaskSpec) -> str:
    """What the task is called: a published name, the demo, or the training file's name."""
    if config.data.task is not None:
        return config.data.task
    return spec.name if config.data.train is not None else f"demo {spec.name}"
