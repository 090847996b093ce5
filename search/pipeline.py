"""A whole search, from teacher to report: the order of phases and what each hands to the next."""

from __future__ import annotations

from typing import Any

from engine.checkpoint import load_weights
from engine.evaluation import evaluate
from engine.export import export_model
from engine.files import write_json_atomic
from engine.metrics import primary
from engine.teacher import Teacher
from engine.teacher.finetune import finetune
from kernels.cache import cache_dir
from search.baselines import derive_baseline, hand_designed, random_search
from search.context import Context, Prepared
from search.derive import Derived, derive
from search.progress import Reporter
from search.report import build_report
from search.stages import stage1, stage2, stage3, stage3_supernet, warm_up
from search.summary import summarise


def run(ctx: Context) -> dict[str, Any]:
    """Carries out every phase that is not finished yet; returns the summary.

    Everything a finished phase produced is read back from the run directory, so calling this again after any
    interruption continues the run.
    """
    config = ctx.config
    with ctx.timed("teacher"):
        ctx.teacher = teach(ctx, ctx.reporter)
    with ctx.timed("teacher evaluation"):
        teacher_metrics = evaluate(ctx.teacher.model, ctx.data.dev, ctx.spec, precision=config.teacher_precision)
    ctx.reporter.info(_score_line("teacher", ctx, teacher_metrics))

    supernet = warm_up(ctx)
    first = stage1(ctx, supernet)
    second = stage2(ctx, supernet, first.best().architecture)
    expressions = second.best().architecture
    shared, space = stage3_supernet(ctx, supernet, expressions)
    third = stage3(ctx, shared, space, expressions)
    found = third.best().architecture

    if config.derive.start == "warmup":
        load_weights(ctx.rundir.stage(3) / "warmup.safetensors", shared)
    best = derive(ctx, "derive", shared, found)
    export(ctx, best)
    ctx.reporter.info(_score_line("found model", ctx, best.dev))

    stages = {"1": first, "2": second, "3": third}
    baselines: dict[str, Derived] = {}
    if config.baselines.gelu:
        architecture = hand_designed(ctx.space, best.params)
        baselines["gelu"] = derive_baseline(ctx, "gelu", supernet, architecture)
    if config.baselines.random:
        stages["random"] = random_search(ctx, supernet, sum(len(log.trials) for log in stages.values()))
        baselines["random"] = derive_baseline(ctx, "random", supernet, stages["random"].best().architecture)
    for name, derived in baselines.items():
        ctx.reporter.info(_score_line(f"baseline {name}", ctx, derived.dev))

    summary = summarise(ctx, best, baselines, teacher_metrics, stages)
    write_json_atomic(ctx.rundir.path / "summary.json", summary)
    build_report(ctx.rundir.path)
    return summary


def teach(prepared: Prepared, reporter: Reporter) -> Teacher:
    """Stage 0: the teacher fine-tuned on the task, or found in the cache."""
    config = prepared.config
    with reporter.phase("teacher", 1) as bar:
        return finetune(
            config.teacher,
            prepared.data,
            config.finetune,
            cache_dir=cache_dir() / "teachers",
            device=prepared.device,
            precision=config.teacher_precision,
            progress=lambda done, total, **metrics: bar.update(done, "", total=total),
        )


def export(ctx: Context, best: Derived) -> None:
    """Writes best/architecture.json and best/model/."""
    best.architecture.save(ctx.rundir.architecture, ctx.shape)
    name, value = primary(ctx.spec, best.dev)
    card = {
        "name": ctx.rundir.path.name,
        "task": ctx.spec.name,
        "teacher": ctx.config.teacher,
        "metric": {"name": name, "value": value, "split": "dev"},
        "metrics": best.dev,
        "sampler": ctx.config.sampler.name,
        "seed": ctx.config.seed,
        "trials": f"{ctx.config.stage1.trials} + {ctx.config.stage2.trials} + {ctx.config.stage3.trials}",
    }
    export_model(best.model, ctx.teacher.tokenizer, ctx.rundir.model, None, card)


def _score_line(name: str, ctx: Context, metrics: dict[str, float]) -> str:
    metric, value = primary(ctx.spec, metrics)
    return f"{name}: {metric} {value:.4f} on dev"
