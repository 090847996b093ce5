"""The three stages, coarse to fine, each handing its result to the next (EfficientBERT, section 3.3).

    warm-up   GELU supernet (largest stack and ratio) distilled on text
    stage 1   expressions and (stack, ratio) jointly, per layer; proxy training from the supernet's sliced weights
    stage 2   expressions at the stage-1 (stack, ratio); starts from the stage-1 winner and its GELU twin
    stage 3   (stack, ratio) at the stage-2 expressions; one supernet distilled with a random in-budget subnet a
              step, candidates scored with its shared weights, without retraining

Stages 1 and 2 share one warmed-up supernet, as in the paper.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import Batch
from engine.distill import Distiller
from engine.files import write_json_atomic
from engine.objective import KDLoss
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import inherit
from kernels.language.expression import GELU_FFN, Expression, kron_weights, with_kron
from search.config.schema import StageConfig
from search.context import Context
from search.ledger.board import Board
from search.multitask import TaskDistillers, all_training_data, several_heads
from search.phases import train_phase
from search.report.tables import write_candidates
from search.samplers import Sampler, make_sampler, sampler_options
from search.scoring.proxy import ProxyTrainer
from search.scoring.shared_scores import SharedScorer
from search.scoring.trials import Evaluate, TrialLog, run_trials
from search.space import SearchSpace


def largest(ctx: Context, expressions: tuple[Expression, ...]) -> Architecture:
    """The supernet's architecture: `expressions` at the largest stack and ratio of the space."""
    stack, ratio = max(ctx.space.stacks), max(ctx.space.ratios)
    return Architecture(tuple(LayerSpec(e, stack, ratio) for e in expressions))


def gelu_twin(architecture: Architecture) -> Architecture:
    """The same (stack, ratio) and Kronecker weights in every layer, with the hand-designed GELU FFN."""
    return Architecture(
        tuple(
            LayerSpec(with_kron(GELU_FFN, kron_weights(layer.expression)), layer.stack, layer.ratio)
            for layer in architecture.layers
        )
    )


def warm_up(ctx: Context, architecture: Architecture | None = None) -> FFNASPreTrainedModel:
    """A supernet distilled on text: the GELU one, shared by stages 1 and 2, unless another is given."""
    supernet = ctx.new_student(architecture or largest(ctx, (GELU_FFN,) * ctx.shape.num_layers), "supernet")
    distiller = ctx.distiller("text")
    train_phase(
        ctx,
        "warm-up",
        supernet,
        ctx.data.text,
        ctx.config.warmup,
        lambda batch, _: distiller.text_loss(supernet, batch),
        ctx.rundir.stage(1) / "supernet.safetensors",
    )
    return supernet


def stage1(ctx: Context, supernet: FFNASPreTrainedModel) -> TrialLog:
    """Expressions and (stack, ratio) jointly; starts from the GELU variants that fit the budget.

    A stage of few trials starts from every second, third, ... of them, so that they take at most half of it.
    """
    seeds, settings = ctx.space.gelu_seeds(), ctx.config.stage1
    step = max(1, math.ceil(len(seeds) / max(1, settings.trials // 2)))
    return _expression_stage(ctx, 1, settings, ctx.space, supernet, seeds[::step])


def stage2(ctx: Context, supernet: FFNASPreTrainedModel, winner: Architecture) -> TrialLog:
    """Expressions at the winner's (stack, ratio)."""
    space = ctx.space.with_shapes(tuple((layer.stack, layer.ratio) for layer in winner.layers))
    return _expression_stage(ctx, 2, ctx.config.stage2, space, supernet, [winner, gelu_twin(winner)])


def _expression_stage(
    ctx: Context,
    number: int,
    settings: StageConfig,
    space: SearchSpace,
    supernet: FFNASPreTrainedModel,
    initial: list[Architecture],
) -> TrialLog:
    name = f"stage{number}"
    sampler = new_sampler(ctx, name, space, settings.startup, initial)
    proxy = ProxyTrainer(ctx, name, settings, supernet)
    board = ctx.board(name, supernet)
    together, compared = settings.population, proxy.compared
    return _search(ctx, number, settings.trials, sampler, space, proxy, board, together, compared=compared)


def stage3_supernet(
    ctx: Context, supernet: FFNASPreTrainedModel, winner: Architecture
) -> tuple[FFNASPreTrainedModel, SearchSpace]:
    """The weight-shared supernet of stage 3, distilled on text and then on the task, and its space.

    Text-distilled weights stay in stage3/warmup.safetensors, task-distilled ones in stage3/supernet.safetensors. With
    `data.tasks` the task phase goes over several tasks (`search.multitask`), whose heads are in the latter file too.
    """
    expressions = tuple(layer.expression for layer in winner.layers)
    space = ctx.space.with_expressions(expressions)
    model = ctx.new_student(largest(ctx, expressions), "stage3-supernet")
    inherit(model, supernet)
    distiller = ctx.distiller(stage=True)
    folder, settings = ctx.rundir.stage(3), ctx.config.stage3
    text = partial(_subnet_loss, ctx, ctx.distiller("text", stage=True), model, space, "text")
    train_phase(ctx, "stage3 text", model, ctx.data.text, settings.text, text, folder / "warmup.safetensors")
    result = folder / "supernet.safetensors"
    if not ctx.others:
        task = partial(_subnet_loss, ctx, distiller, model, space, "task")
        train_phase(ctx, "stage3 task", model, ctx.data.train, settings.task, task, result)
        return model, space
    heads, distillers = several_heads(ctx, model), TaskDistillers(ctx)
    if ctx.joined is None and not ctx.ranks.agree(result.exists):
        distillers.load()

    def of_its_task(batch: Batch, step: int) -> KDLoss:
        return _subnet_loss(ctx, distillers.of(batch.task), heads.of(batch.task), space, "task", batch, step)

    train_phase(ctx, "stage3 task", heads, all_training_data(ctx), settings.task, of_its_task, result)
    return model, space


def _subnet_loss(
    ctx: Context,
    distiller: Distiller,
    model: FFNASPreTrainedModel,
    space: SearchSpace,
    part: str,
    batch: Batch,
    step: int,
) -> KDLoss:
    rng = np.random.default_rng(ctx.seed("stage3", part, "subnet", step))
    settings = ctx.config.stage3
    subnets = [space.sample(rng) for _ in range(settings.subnets)]
    return distiller.mixed_loss(model, batch, subnets, task=part == "task", average=settings.gradients == "mean")


def stage3(ctx: Context, model: FFNASPreTrainedModel, space: SearchSpace, winner: Architecture) -> TrialLog:
    """(stack, ratio) by shared weights: every candidate is a view of `model`, scored as it is."""
    settings = ctx.config.stage3
    sampler = new_sampler(ctx, "stage3", space, settings.startup, [winner])

    scorer = SharedScorer(ctx, model)
    board = ctx.board("stage3", model)
    race = settings.race > 1
    return _search(ctx, 3, settings.trials, sampler, space, scorer, board, settings.together, as_group=race)


def new_sampler(
    ctx: Context, name: str, space: SearchSpace, startup: int, initial: list[Architecture], kind: str | None = None
) -> Sampler:
    """The configured sampler (or `kind`) over `space`, seeded by `name`, proposing `initial` first."""
    options = ctx.config.sampler
    kind = kind or options.name
    limits = space.limits
    settings: dict[str, Any] = {
        "startup": startup,
        "rebuild_every": options.rebuild_every,
        "exploration": options.exploration,
    }
    if limits is not None:
        initial = [a for a in initial if limits.violation(a) is None]
        if len(ctx.config.objectives.names) > 1:
            settings["costs"] = limits.costs.objectives(ctx.config.objectives.names)
    extra = {option: settings[option] for option in sampler_options(kind) if option in settings}
    return make_sampler(kind, space, ctx.seed(name, "sampler"), initial=initial, **extra)


def _search(
    ctx: Context,
    number: int,
    total: int,
    sampler: Sampler,
    space: SearchSpace,
    evaluate_candidates: Evaluate,
    board: Board,
    together: int = 1,
    as_group: bool = False,
    compared: bool = False,
) -> TrialLog:
    name = f"stage{number}"
    with ctx.timed(f"{name} candidates"):
        log = run_trials(
            name,
            total,
            sampler,
            space,
            evaluate_candidates,
            ctx.ledger,
            ctx.reporter,
            together=together,
            concurrent=ctx.config.sampler.concurrent,
            as_group=as_group,
            on_trial=ctx.scalars.trial if ctx.scalars is not None else None,
            compared=compared,
            board=board,
        )
    best = log.best()
    folder = ctx.rundir.stage(number)
    write_candidates(folder / "candidates.csv", log.trials)
    write_json_atomic(folder / "sampler.json", sampler.diagnostics())
    write_json_atomic(
        folder / "best.json",
        {
            "number": best.number,
            "score": best.score,
            "params": best.params,
            "architecture": str(best.architecture),
            "duplicates": log.duplicates,
        },
    )
    return log
