"""Strategy `inherit`, from the fine-tuned teacher to finished students: the order of its phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.data import EncodedDataset, EncodedTask
from engine.data.task import NEG_LOG_LOSS
from engine.evaluation.evaluation import evaluate, evaluate_dev
from engine.evaluation.metrics import primary
from engine.training.settings import PhaseSettings
from kernels.language.expression import parse_expression
from search.config.checks import parse_shares
from search.context import Context, Prepared
from search.derive import BestWeights, Derived
from search.inherit.candidates import entrants
from search.inherit.keep import check_ladder, hold
from search.inherit.last_round import last_round
from search.inherit.latency import conditions, layer_milliseconds, student_milliseconds
from search.inherit.library import Library, build_library
from search.inherit.limits import budget_of
from search.inherit.total import Tables
from search.inherit.variants import Variants, kept, variants
from search.ledger.ledger import Trial
from search.phases import batch_plan, train_phase

GROUPS = {"solved": "search", "uniform": "uniform", "random": "random"}
"""Groups of the last round, and the names their finished students have in summary and report."""

ORDER = "inherit finish"
"""Finished students see the same batches in the same order."""


def find(ctx: Context) -> tuple[Derived, dict[str, Derived], dict[str, Any]]:
    """Carries out the phases that are not finished; returns the found model, the others by name, and numbers for the
    summary."""
    made = choices(ctx)
    tables = Tables(ctx, made)
    library = build_library(ctx, made)
    if ctx.config.budget.keep is not None:
        best, students, ladder = hold(ctx, library, tables, lambda name, a: finish(ctx, name, library, tables, a))
        return best, students, {"chosen": "search", **facts(ctx, best), "keep": ladder}
    budget = budget_of(ctx, made, tables, lambda: layer_milliseconds(ctx, library))
    settings = ctx.config.inherit
    field = entrants(
        library,
        budget,
        solved=settings.candidates,
        controls=settings.uniform,
        drawn=settings.random,
        seed=ctx.seed("inherit", "random"),
    )
    trials = last_round(ctx, library, field, lambda a: tables.total(a, tables.choose(a)))
    finished: dict[str, Derived] = {}
    for group, name in GROUPS.items():
        winner = best_of(trials, group)
        if winner is None:
            continue
        twin = next((n for n, d in finished.items() if d.architecture == winner.architecture), None)
        finished[name] = finished[twin] if twin is not None else finish(ctx, name, library, tables, winner.architecture)
    chosen = max(finished, key=lambda name: (finished[name].choice, name == "search"))
    told = {"chosen": chosen, **facts(ctx, finished[chosen])}
    if "latency_ms" in budget.names:
        told["latency"] = latency_of(ctx, library, finished[chosen])
    return finished[chosen], finished, told


def latency_of(ctx: Context, library: Library, derived: Derived) -> dict[str, Any]:
    """What the budget counted for a finished student, and what it takes when measured, as summary.json holds it."""
    times, rest = layer_milliseconds(ctx, library)
    number = {spec: k for k, spec in enumerate(library.variants.specs)}
    predicted = rest + sum(times[number[layer]] for layer in derived.architecture.layers)
    at = conditions(ctx)
    told = f"{at['batch_size']} x {at['sequence_length']} tokens, {at['threads']} threads, {at['device']}"
    return {
        "predicted_ms": float(predicted),
        "measured_ms": student_milliseconds(ctx, derived.model),
        "conditions": told,
    }


def facts(ctx: Prepared, derived: Derived) -> dict[str, Any]:
    """Layers and token table of a finished student, for summary and model card."""
    own, config = ctx.teacher.model.config, derived.model.config
    return {
        "layers": list(kept(derived.architecture)),
        "embedding_rank": None if config.embedding_type == own.embedding_type else config.embedding_size,
        "vocabulary": config.vocab_size,
        "teacher_vocabulary": own.vocab_size,
    }


def how_inherited(facts: dict[str, Any]) -> dict[str, Any]:
    """What the model card says about the search."""
    layers = ", ".join(str(layer) for layer in facts["layers"])
    told = {"strategy": "inherit", "made of": f"layers {layers} of the teacher"}
    if "keep" in facts:
        told["size"] = facts["keep"]["verdict"]
    if facts["embedding_rank"] is not None:
        told["token table"] = f"factorized, rank {facts['embedding_rank']}"
    if facts["vocabulary"] < facts["teacher_vocabulary"]:
        told["vocabulary"] = (
            f"cut to {facts['vocabulary']:,} of the teacher's {facts['teacher_vocabulary']:,} pieces: those of the"
            " training texts, single characters and some frequent ones; other words are cut into these"
        )
    return told


def check(prepared: Prepared) -> None:
    """Raises `UserError` where no student can be as small as asked, or its table not be as asked; trains nothing."""
    made = choices(prepared)
    Tables(prepared, made).check()
    if prepared.config.budget.keep is not None:
        check_ladder(prepared, made)


def choices(ctx: Prepared) -> Variants:
    """What a layer of this run's teacher may become."""
    settings, config = ctx.config.inherit, ctx.teacher.model.config
    expression = config.full_architecture.layers[0].expression
    return variants(
        teacher_shape(ctx),
        expression,
        parse_shares("inherit.ratios", settings.ratios),
        parse_shares("inherit.heads", settings.heads),
        tuple(parse_expression(text) for text in settings.expressions),
    )


def teacher_shape(ctx: Prepared) -> ModelShape:
    """Sizes of the teacher, which is one of our models."""
    config = ctx.teacher.model.config
    return replace(config.shape, num_heads=config.num_attention_heads, teacher_hidden_size=None)


def best_of(trials: list[Trial], group: str) -> Trial | None:
    """The best student of a group that trained to the end of the round; of none that did, the best stopped one."""
    own = [t for t in trials if t.attrs.get("group") == group and t.score is not None]
    finished = [t for t in own if t.state == "complete"] or own
    return min(finished, key=lambda t: (-(t.score or 0.0), t.params, t.number), default=None)


def steps_of(ctx: Context, data: EncodedDataset) -> int:
    """Optimizer steps of the full distillation: as configured, or by the number of rows.

    The rule is three passes, at least 300 steps and at most 900: small sets gain from passes, large ones from rows.
    """
    settings = ctx.config.inherit
    if settings.steps is not None:
        return settings.steps
    return int(min(900, max(300, 3 * data.num_batches(settings.batch_size))))


def finish(ctx: Context, name: str, library: Library, tables: Tables, architecture: Architecture) -> Derived:
    """Distils a student in full from its inherited weights; the checkpoint is chosen on the selection split."""
    settings = ctx.config.inherit
    total = steps_of(ctx, ctx.data.train)
    phase = PhaseSettings(steps=total, batch_size=settings.batch_size, lr=settings.lr)
    distiller = ctx.distiller()
    targets = ctx.targets(ORDER, need_logits=True, plan=batch_plan(ctx, ctx.data.train, phase, ORDER))
    table = tables.choose(architecture)
    model, data = tables.student(library.assemble(architecture), table), tables.data(table)
    best = BestWeights(ctx, model, max(1, round(total / settings.evaluations)), data.select)
    folder = ctx.rundir.checkpoints / name
    folder.mkdir(exist_ok=True)
    train_phase(
        ctx,
        f"{name} task",
        model,
        data.train,
        phase,
        lambda batch, step: distiller.task_loss(model, batch, targets=targets.get(step, tables.original(batch, table))),
        folder / "task.safetensors",
        order=ORDER,
        after_step=best.after_step,
        extra_state=best.state,
        restore_extra=best.restore,
        finish=best.finish,
    )
    model.requires_grad_(True).eval()  # as users expect it
    rows: list[np.ndarray] = []
    dev = evaluate_dev(model, data, precision=ctx.precision, keep=rows.append)
    return Derived(
        model=model,
        architecture=architecture,
        params=tables.total(architecture, table),
        select=evaluate(model, data.select, ctx.score_spec, precision=ctx.precision),
        dev=dev,
        rows=rows[0],
        tokenizer=tables.tokenizer_of(table),
        choice=held_out_score(ctx, model, data),
    )


def held_out_score(ctx: Context, model: nn.Module, data: EncodedTask) -> float:
    """What finished students are chosen by: log-likelihood over the score and select rows; without classes, the metric.

    Accuracy on a few hundred rows has steps that are larger than what finished students differ by.
    """
    smooth = NEG_LOG_LOSS if NEG_LOG_LOSS in ctx.spec.metrics else ctx.spec.metric
    spec, splits = replace(ctx.spec, metric=smooth), (data.score, data.select)
    values = [primary(spec, evaluate(model, split, spec, precision=ctx.precision))[1] for split in splits]
    return float(np.average(values, weights=[len(split) for split in splits]))
