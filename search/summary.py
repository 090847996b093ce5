"""summary.json: what a run found, beside its baselines and its teacher."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from engine.evaluation.metrics import primary
from engine.latency.build import model_milliseconds
from engine.student.supernet import extract
from kernels.dispatch import preferred_backend
from search.config.latency_tables import stated
from search.context import Context
from search.derive import Derived
from search.finished import weights_hash
from search.report.titles import title_of
from search.scoring.trials import TrialLog

OVER = 1.02
"""A measured latency of so many times the limit still counts as met; timings differ by that much."""

_PACKAGES = ("ffnas", "torch", "transformers", "datasets", "numpy", "optuna", "scikit-learn")


def describe(ctx: Context, derived: Derived) -> dict[str, Any]:
    """One model: architecture, size and metrics; `metric` is the task's primary one on the reported split."""
    name, value = primary(ctx.spec, derived.dev)
    return {
        "architecture": str(derived.architecture),
        "params": derived.params,
        "costs": ctx.space.limits.costs.of(derived.architecture) if ctx.space.limits is not None else {},
        "params_without_fit_dense": derived.params
        if ctx.inherits  # which has none, and maybe smaller tables than the space knows
        else ctx.space.parameters(derived.architecture, fit_dense=False),
        "metric": {"name": name, "value": value, "split": "dev"},
        "metrics": {"dev": derived.dev, "select": derived.select},
    }


def describe_teacher(ctx: Context, metrics: dict[str, float]) -> dict[str, Any]:
    """The teacher, its size without the task head and its metrics on the reported split."""
    name, value = primary(ctx.spec, metrics)
    model = ctx.teacher.model
    return {
        "source": ctx.config.teacher,
        "params": sum(p.numel() for p in model.base_model.parameters()),
        "layers": ctx.teacher.num_layers,
        "hidden_size": ctx.teacher.hidden_size,
        "metric": {"name": name, "value": value, "split": "dev"},
        "metrics": {"dev": metrics},
    }


def latency(ctx: Context, best: Derived) -> dict[str, Any]:
    """Predicted and measured latency of the found model and the table's error, where the search had a latency table."""
    table = ctx.space.limits.costs.table if ctx.space.limits is not None else None
    if table is None:
        return {}
    measured = model_milliseconds(extract(best.model, None), table.conditions)
    predicted = table.predict(best.architecture)
    return {
        "latency": {
            "limit_ms": ctx.config.budget.latency_ms,
            "predicted_ms": predicted,
            "measured_ms": measured,
            "conditions": str(table.conditions),
            "table": stated(table, ctx.config.budget.latency_ms),
        },
    }


def latency_line(took: dict[str, Any], limit: float | None, run: Path) -> str:
    """The found model's latency for the log, with what to do where it is above the limit.

    Args:
        took: `latency` of summary.json.
        limit: milliseconds asked for, if any.
        run: the run's directory.
    """
    line = f"latency: {took['measured_ms']:.3g} ms measured, {took['predicted_ms']:.3g} predicted"
    if limit is None:
        return line
    line += f", {limit:.3g} allowed"
    if took["measured_ms"] <= OVER * limit:
        return line
    return f"{line}: too slow; ffnas search --resolve {run} --budget.latency-ms {limit:g} corrects by measurement"


def summarise(
    ctx: Context,
    best: Derived,
    baselines: dict[str, Derived],
    teacher_metrics: dict[str, float],
    stages: dict[str, TrialLog],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
        ctx: the run.
        best: the found model.
        baselines: by name.
        teacher_metrics: of the teacher on the reported split.
        stages: trial logs by stage: "1", "2", "3", and "random" where that baseline ran.
    """
    logs = list(stages.values())
    return {
        "title": title_of(ctx, best.model),
        "task": {**ctx.spec.to_dict(), "rows": {n: len(getattr(ctx.data, n)) for n in _SPLITS}},
        "score": {"name": ctx.score_spec.metric, "split": "score"},
        "best": {**describe(ctx, best), "model": "best/model"},
        "weights": weights_hash(ctx.rundir),
        "baselines": {name: describe(ctx, derived) for name, derived in baselines.items()},
        "teacher": describe_teacher(ctx, teacher_metrics),
        "student": {"hidden_size": ctx.shape.hidden_size, "layers": ctx.shape.num_layers},
        "budget": {"params": list(ctx.space.budget), **_limits(ctx)},
        **latency(ctx, best),
        "trials": {
            **{name: len(log.trials) for name, log in stages.items()},
            "failed": sum(t.score is None for log in logs for t in log.trials),
            "duplicates": sum(log.duplicates for log in logs),
        },
        "seconds": {name: round(seconds, 3) for name, seconds in ctx.seconds.items()},
        "device": str(ctx.device),
        "backend": preferred_backend(ctx.device.type),
        "precision": ctx.precision,
        "seed": ctx.config.seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "notes": list(ctx.task.notes),
    }


def _limits(ctx: Context) -> dict[str, float]:
    """Limits beside the parameters, as they were asked for (of latency the space keeps a tighter one)."""
    active = ctx.space.limits.active if ctx.space.limits is not None else {}
    asked = ctx.config.budget.latency_ms
    return {n: asked if n == "latency_ms" and asked is not None else v for n, v in active.items()}


_SPLITS = ("train", "score", "select", "dev", "text")


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
