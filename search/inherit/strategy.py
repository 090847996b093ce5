"""Strategy `inherit`, from the fine-tuned teacher to finished students: the order of its phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import parse_expression
from search.config.checks import parse_shares
from search.context import Context, Prepared
from search.derive import Derived
from search.inherit.candidates import entrants
from search.inherit.finish import Finisher, Winner
from search.inherit.keep import check_ladder, hold
from search.inherit.last_round import best_of, last_round, remove_round
from search.inherit.latency import conditions, layer_milliseconds, student_milliseconds
from search.inherit.library import Library, build_library
from search.inherit.limits import budget_of
from search.inherit.texts import unused, with_text
from search.inherit.total import Tables
from search.inherit.variants import Variants, kept, variants

GROUPS = {"solved": "search", "uniform": "uniform", "random": "random"}
"""Groups of the last round, and the names their finished students have in summary and report."""


def find(ctx: Context) -> tuple[Derived, dict[str, Derived], dict[str, Any]]:
    """Carries out the phases that are not finished; returns the found model, the others by name, and numbers for the
    summary."""
    ctx.data = with_text(ctx)
    made = choices(ctx)
    tables = Tables(ctx, made)
    library = build_library(ctx, made)
    finisher = Finisher(ctx, library, tables)
    if ctx.config.budget.keep is not None:
        best, students, ladder = hold(
            ctx, library, tables, lambda name, made, round_: finisher.finish_all([Winner(name, name, made)], round_)[0]
        )
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
    found = [(name, group, best_of(trials, group)) for group, name in GROUPS.items()]
    winners = {name: Winner(name, group, trial.architecture) for name, group, trial in found if trial is not None}
    different = {w.architecture: w for w in reversed(winners.values())}  # of equal ones, the first
    models = dict(zip(different, finisher.finish_all(list(different.values()), field), strict=True))
    remove_round(ctx, list(GROUPS))
    finished = {name: models[winner.architecture] for name, winner in winners.items()}
    chosen = max(finished, key=lambda name: (finished[name].choice, name == "search"))
    told = {"chosen": chosen, **facts(ctx, finished[chosen])}
    if "latency_ms" in budget.names:
        told["latency"] = latency_of(ctx, library, finished[chosen])
    return finished[chosen], finished, told


def latency_of(ctx: Context, library: Library, derived: Derived) -> dict[str, Any]:
    """What the budget counted for a finished student, and what it takes when measured, as summary.json holds it."""
    took = layer_milliseconds(ctx, library)
    number = {spec: k for k, spec in enumerate(library.variants.specs)}
    predicted = took.rest + sum(took.variants[number[layer]] for layer in derived.architecture.layers)
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
    told = {"strategy": "inherit", "made of": f"layers {layers} of the teacher, counted from 0"}
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
    reason = unused(prepared)
    if reason is not None:
        raise UserError(f"{reason}: leave it out")
    prepared = replace(prepared, data=with_text(prepared))
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
