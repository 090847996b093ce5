"""Strategy `inherit`, from the fine-tuned teacher to finished students: the order of its phases."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np

from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import parse_expression
from search.config.checks import parse_shares
from search.context import Context, Prepared
from search.derive import Derived
from search.inherit.candidates import Budget, entrants
from search.inherit.finish import Finisher, Winner
from search.inherit.last_round import best_of, last_round
from search.inherit.latency import conditions, layer_milliseconds, student_milliseconds
from search.inherit.library import Library, build_library
from search.inherit.texts import unused, with_text
from search.inherit.total import Tables
from search.inherit.variants import Variants, kept, variants

GROUPS = {"solved": "search", "uniform": "uniform", "random": "random"}
"""Groups of the last round, and the names their finished students have in summary and report."""

SLACK = 0.005
"""A share of the encoder is kept to within this, so that three of six layers at a quarter of their width, biases and
norms included, are a quarter of it."""


def find(ctx: Context) -> tuple[Derived, dict[str, Derived], dict[str, Any]]:
    """Carries out the phases that are not finished; returns the found model, the others by name, and numbers for the
    summary."""
    ctx.data = with_text(ctx)
    made = choices(ctx)
    tables = Tables(ctx, made)
    library = build_library(ctx, made)
    budget = budget_of(ctx, library, tables)
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
    finisher = Finisher(ctx, library, tables)
    found = [(name, group, best_of(trials, group)) for group, name in GROUPS.items()]
    winners = {name: Winner(name, group, trial.architecture) for name, group, trial in found if trial is not None}
    different = {w.architecture: w for w in reversed(winners.values())}  # of equal ones, the first
    models = dict(zip(different, finisher.finish_all(list(different.values())), strict=True))
    finished = {name: models[winner.architecture] for name, winner in winners.items()}
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


def facts(ctx: Context, derived: Derived) -> dict[str, Any]:
    """Layers and token table of a finished student, for summary and model card."""
    own, config = ctx.teacher.model.config, derived.model.config
    return {
        "layers": list(kept(derived.architecture)),
        "embedding_rank": None if config.embedding_type == own.embedding_type else config.embedding_size,
        "vocabulary": config.vocab_size,
        "teacher_vocabulary": own.vocab_size,
    }


def check(prepared: Prepared) -> None:
    """Raises `UserError` where no student can be as small as asked, or its table not be as asked; trains nothing."""
    reason = unused(prepared)
    if reason is not None:
        raise UserError(f"{reason}: leave it out")
    Tables(replace(prepared, data=with_text(prepared)), choices(prepared)).check()


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


def budget_of(ctx: Context, library: Library, tables: Tables) -> Budget:
    """The limits of the configuration, as sums over layers; of tables, the smallest counts."""
    made, budget = library.variants, ctx.config.budget
    shape = made.shape
    layers = shape.num_layers
    sizes = np.array([[made.layer(spec) for spec in made.specs]] * layers, dtype=np.float64)
    names, costs, limits = [], [], []
    if budget.params is not None:
        names.append("params")
        costs.append(sizes)
        limits.append(budget.params[1] - tables.fixed)
    if budget.flops is not None:
        length = ctx.config.objectives.sequence_length or ctx.config.data.max_length
        names.append("flops")
        costs.append(np.array([[made.layer_flops(spec, length) for spec in made.specs]] * layers, dtype=np.float64))
        limits.append(budget.flops - made.rest_flops(length))
    if budget.latency_ms is not None or budget.speedup is not None:
        times, rest = layer_milliseconds(ctx, library)
        whole = layers * times[0] + rest
        names.append("latency_ms")
        costs.append(np.tile(times, (layers, 1)))
        limits.append(min(budget.latency_ms or whole, whole / (budget.speedup or 1.0)) - rest)
    if budget.encoder is not None or not names:
        names.append("encoder")
        costs.append(sizes)
        share = Fraction(1, 4) if budget.encoder is None else Fraction(budget.encoder).limit_denominator(10**6)
        limits.append(float(share * made.encoder(made.whole)) * (1 + SLACK))
    if tables.most is not None:
        names.append("total")
        costs.append(sizes)
        limits.append(tables.most - tables.fixed)
    return Budget(tuple(names), np.stack(costs), tuple(limits))
