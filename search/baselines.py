"""Baselines trained with the same budget as the found model, for the same report.

- `gelu`: the hand-designed student. GELU FFNs, as uniform over the layers as the parameter count allows.
- `random`: the best of random search: as many joint random candidates as the whole search evaluated, each scored by
  stage 1's proxy training, the best one derived like the found model.

Both start from the same warmed-up GELU supernet and get the text steps that warmed up stage 3 on top of the derive
recipe, so that no model has seen more text than another.

Rejected as the hand-designed student: the GELU twin of the found architecture. It has the same parameter count but
inherits the searched stacks and ratios, which nobody designed by hand.
"""

from __future__ import annotations

from itertools import product

from engine.architecture.architecture import Architecture, LayerSpec
from engine.student.modeling import FFNASPreTrainedModel
from kernels.language.expression import GELU_FFN
from search.context import Context
from search.derive import Derived, derive, text_steps
from search.report.tables import write_candidates
from search.scoring.proxy import ProxyTrainer
from search.scoring.trials import TrialLog, run_trials
from search.space import SearchSpace
from search.stages import new_sampler

COUNT_TOLERANCE = 0.005
"""Two models within this share of parameters count as of the same size."""


def hand_designed(space: SearchSpace, params: int) -> Architecture:
    """The GELU architecture of about `params` parameters that is most uniform over the layers.

    Considered are all architectures whose lower k layers share one (stack, ratio) and whose upper layers another.
    Within `COUNT_TOLERANCE` of `params` the one with the fewest different layers wins, then the closest; if none is
    that close, the closest.
    """
    shapes = list(product(space.stacks, space.ratios))
    num_layers = space.shape.num_layers
    best: tuple[tuple[bool, int, int, tuple[object, ...]], Architecture] | None = None
    for lower, upper in product(shapes, shapes):
        for k in range(1, num_layers + 1) if lower != upper else (num_layers,):
            chosen = [lower] * k + [upper] * (num_layers - k)
            architecture = Architecture(tuple(LayerSpec(GELU_FFN, *shape) for shape in chosen))
            difference = abs(space.parameters(architecture) - params)
            far = difference > COUNT_TOLERANCE * params
            rank = (far, difference if far else len(set(chosen)), difference, tuple(chosen))
            if best is None or rank < best[0]:
                best = (rank, architecture)
    if best is None:
        raise ValueError("the space has no (stack, ratio)")
    return best[1]


def derive_baseline(ctx: Context, name: str, supernet: FFNASPreTrainedModel, architecture: Architecture) -> Derived:
    """Derives a baseline from the GELU supernet, with the text steps the found model's source had on top."""
    extra = text_steps(ctx, ctx.config.stage3.text, "stage3 text")
    return derive(ctx, name, supernet, architecture, extra_text_steps=extra)


def random_search(ctx: Context, supernet: FFNASPreTrainedModel, trials: int) -> TrialLog:
    """Random search over the joint space: `trials` candidates, each by stage 1's proxy training."""
    sampler = new_sampler(ctx, "random", ctx.space, 0, [], kind="random")
    proxy = ProxyTrainer(ctx, "random", ctx.config.stage1, supernet)
    with ctx.timed("random candidates"):
        log = run_trials(
            "random",
            trials,
            sampler,
            ctx.space,
            proxy,
            ctx.ledger,
            ctx.reporter,
            together=ctx.config.stage1.population,
            concurrent=ctx.config.sampler.concurrent,
            compared=proxy.compared,
            board=ctx.board("random", supernet),
            on_trial=ctx.scalars.trial if ctx.scalars is not None else None,
        )
    ctx.rundir.baseline("random").mkdir(parents=True, exist_ok=True)
    write_candidates(ctx.rundir.baseline("random") / "candidates.csv", log.trials)
    return log
