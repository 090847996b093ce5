"""What a configuration may hold: every field is checked before anything is loaded or written.

One function per part of `search.config.schema`; the first wrong field ends in a `UserError` of one line naming the
field, its value and the remedy.

Rejected: checks in the dataclasses' `__post_init__`. A command line is put together option by option, and a tree that
is wrong in between would end it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from engine.errors import UserError
from engine.training.settings import PhaseSettings
from search.config.schema import SearchConfig, SharedStageConfig, SpaceConfig, StageConfig, StudentConfig
from search.console.trackers import names_of
from search.ledger import url as ledger_url


def validate(config: SearchConfig) -> None:
    """Checks what can be checked without loading anything.

    Raises:
        UserError: one line naming the field, its value and the remedy.
    """
    _choice("strategy", config.strategy, ("auto", "inherit", "paper"))
    _student(config.student)
    _inherit(config)
    _space(config.space)
    _objectives(config)
    _choice("precision", config.precision, ("auto", "fp32", "bf16"))
    _choice("teacher_precision", config.teacher_precision, ("auto", "fp32", "bf16"))
    _choice("files", config.files, ("models", "all"))
    _choice("targets.cache", config.targets.cache, ("memory", "disk", "off"))
    _choice("targets.dtype", config.targets.dtype, ("exact", "bf16"))
    _choice("derive.start", config.derive.start, ("warmup", "supernet"))
    _positive("derive.evaluations", config.derive.evaluations)
    _positive("sampler.rebuild_every", config.sampler.rebuild_every)
    _positive("sampler.concurrent", config.sampler.concurrent)
    _positive("sampler.exploration", config.sampler.exploration, zero=True)
    _positive("kd.temperature", config.kd.temperature)
    _choice("kd.text_teacher", config.kd.text_teacher, ("finetuned", "pretrained"))
    _positive("checkpoint_every", config.checkpoint_every)
    names_of(config.tracker)
    if config.threads is not None:
        _positive("threads", config.threads)
    if config.ledger is not None:
        ledger_url.check(config.ledger)
        if not config.name:
            raise UserError("ledger: a shared ledger needs the run's name in it: give --name, the same to all workers")
    _expression_stage("stage1", config.stage1)
    _expression_stage("stage2", config.stage2)
    _shared_stage("stage3", config.stage3)
    _phase("warmup", config.warmup)
    _phase("derive.text", config.derive.text)
    _phase("derive.task", config.derive.task)


def parse_ratios(ratios: list[str]) -> tuple[Fraction, ...]:
    """`space.ratios` as fractions; see `parse_shares`."""
    return parse_shares("space.ratios", ratios)


def parse_shares(name: str, shares: Sequence[str | int | float]) -> tuple[Fraction, ...]:
    """`['1', '1/2']` as fractions; raises `UserError` naming the option `name` and the entry that is no share."""
    parsed = []
    for text in shares:
        try:
            ratio = Fraction(str(text))
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"{name}: {text!r} is not a fraction: write '1', '1/2', ...") from error
        if not 0 < ratio <= 1:
            raise UserError(f"{name}: {text!r} is out of range: ratios lie in (0, 1]")
        parsed.append(ratio)
    return tuple(parsed)


def check_heads(hidden_size: int, num_heads: int) -> None:
    """Raises `UserError` unless `num_heads` divides `hidden_size`."""
    if hidden_size % num_heads:
        lower = hidden_size - hidden_size % num_heads
        remedy = f"use {lower} or {lower + num_heads}" if lower else f"use a multiple of {num_heads}"
        raise UserError(f"student.hidden_size: {hidden_size} is not divisible by {num_heads} attention heads: {remedy}")


INHERIT_ALONE, PAPER_ALONE = ("encoder", "total", "speedup", "keep"), ("memory_mb",)
"""Limits that one of the two strategies knows."""


def check_budget(config: SearchConfig) -> None:
    """Raises `UserError` where the strategy, which is decided by now, does not know a limit that is given."""
    unknown = PAPER_ALONE if config.strategy == "inherit" else INHERIT_ALONE
    for name in unknown:
        value = getattr(config.budget, name)
        if value is not None:
            raise UserError(
                f"budget.{name}: {value!r}: strategy {config.strategy} has no such limit: use"
                f" {'--budget.latency_ms' if config.strategy == 'inherit' else '--budget.params'} or another"
            )


def _student(student: StudentConfig) -> None:
    _positive("student.hidden_size", student.hidden_size)
    _positive("student.num_layers", student.num_layers)
    _positive("student.embedding_size", student.embedding_size)
    if student.ffn_size is not None:
        _positive("student.ffn_size", student.ffn_size)
    if student.num_heads is not None:
        _positive("student.num_heads", student.num_heads)
        check_heads(student.hidden_size, student.num_heads)
    if student.layer_norm_eps is not None:
        _positive("student.layer_norm_eps", student.layer_norm_eps)
    _choice("student.embedding", student.embedding, ("trigram", "full"))
    _choice("student.init", student.init, ("teacher", "random"))
    if not 0 <= student.dropout < 1:
        raise UserError(f"student.dropout: {student.dropout!r} is out of range: a probability in [0, 1)")


def _inherit(config: SearchConfig) -> None:
    settings = config.inherit
    for name in ("ratios", "heads"):
        shares = getattr(settings, name)
        if not shares:
            raise UserError(f"inherit.{name}: the list is empty: give at least one share such as '1/2'")
        parse_shares(f"inherit.{name}", shares)
    for name in (
        "calibration_tokens",
        "score_tokens",
        "score_rows",
        "candidates",
        "round_steps",
        "evaluations",
        "batch_size",
        "lr",
    ):
        _positive(f"inherit.{name}", getattr(settings, name))
    for name in ("uniform", "random", "rungs", "prediction", "gold", "hidden"):
        _positive(f"inherit.{name}", getattr(settings, name), zero=True)
    _positive("inherit.temperature", settings.temperature)
    for name in ("steps", "embedding_rank"):
        if getattr(settings, name) is not None:
            _positive(f"inherit.{name}", getattr(settings, name))
    _choice("inherit.vocabulary", settings.vocabulary, ("full", "seen"))
    if config.budget.speedup is not None and not config.budget.speedup >= 1:
        raise UserError(f"budget.speedup: {config.budget.speedup!r} is out of range: give a number >= 1")
    for name in ("encoder", "total", "keep"):
        share = getattr(config.budget, name)
        if share is not None and not 0 < share <= 1:
            raise UserError(f"budget.{name}: {share!r} is out of range: a share in (0, 1]")
    beside = [name for name, value in vars(config.budget).items() if value is not None and name != "keep"]
    if config.budget.keep is not None and beside:
        raise UserError(
            f"budget.keep: {config.budget.keep!r} asks for the smallest student that holds the score,"
            f" budget.{beside[0]} for the best one of a size: give one of the two"
        )
    if config.strategy != "auto":
        check_budget(config)
    if config.strategy == "inherit" and config.ledger is not None:
        raise UserError("ledger: strategy inherit is one process: leave --ledger out, or use --strategy paper")


def _space(space: SpaceConfig) -> None:
    if not space.stacks or any(s < 1 for s in space.stacks):
        raise UserError(f"space.stacks: {space.stacks!r} is not a list of numbers >= 1")
    if not space.ratios:
        raise UserError("space.ratios: the list is empty: give at least one ratio such as '1/2'")
    parse_ratios(space.ratios)
    _choice("space.policy", space.policy, ("truncate", "pad"))
    if len(space.heights) != 2:
        raise UserError(f"space.heights: {space.heights!r} must be two numbers: lowest and highest")
    if space.file is not None:
        raise UserError("space.file: is read with the command line; use search.space.file.read_space in code")
    from search.space.file import FIELDS  # not above: it imports torch, and `--help` should answer at once

    for name, check in FIELDS.items():
        check(getattr(space, name))


def _objectives(config: SearchConfig) -> None:
    chosen, budget = config.objectives, config.budget
    if budget.params is not None and len(budget.params) != 2:
        raise UserError(f"budget.params: {budget.params!r} must be two numbers: lowest and highest")
    for name in ("flops", "memory_mb", "latency_ms"):
        value = getattr(budget, name)
        if value is not None:
            _positive(f"budget.{name}", value)
    _choice("objectives.score", chosen.score, ("metric", "neg_log_loss", "smooth"))
    if chosen.score != "metric" and config.stage3.race > 1:
        raise UserError(
            f"stage3.race: {config.stage3.race}: a race counts right answers, and objectives.score is {chosen.score}:"
            " set stage3.race to 0, or objectives.score to metric"
        )
    for name in chosen.names:
        _choice("objectives.names", name, ("score", "params", "flops", "memory", "latency"))
    if "score" not in chosen.names or len(set(chosen.names)) < len(chosen.names):
        raise UserError(f"objectives.names: {chosen.names!r}: give score, and every other objective at most once")
    if len(chosen.names) > 1 and config.sampler.name != "nsga2":
        raise UserError(
            f"sampler.name: {config.sampler.name!r} looks for the best score alone: for objectives"
            f" {', '.join(chosen.names)} use --sampler.name nsga2"
        )
    _positive("objectives.batch_size", chosen.batch_size)
    _positive("objectives.threads", chosen.threads)
    if chosen.sequence_length is not None:
        _positive("objectives.sequence_length", chosen.sequence_length)


def _expression_stage(name: str, stage: StageConfig) -> None:
    _trials(name, stage)
    _positive(f"{name}.population", stage.population)
    _positive(f"{name}.rungs", stage.rungs, zero=True)
    if not 0 < stage.score_share <= 1:
        raise UserError(f"{name}.score_share: {stage.score_share!r} is out of range: a share in (0, 1]")
    if stage.reduction < 2:
        raise UserError(f"{name}.reduction: {stage.reduction} is out of range: give a number >= 2")
    for part in ("text", "task"):
        if getattr(stage, part).accumulate != 1:
            raise UserError(
                f"{name}.{part}.accumulate: candidates are trained on whole batches: leave it at 1,"
                f" use a smaller {name}.{part}.batch_size or {name}.population"
            )


def _shared_stage(name: str, stage: SharedStageConfig) -> None:
    _trials(name, stage)
    _positive(f"{name}.subnets", stage.subnets)
    _positive(f"{name}.together", stage.together)
    _positive(f"{name}.race", stage.race, zero=True)
    if not 0 < stage.confidence < 1:
        raise UserError(f"{name}.confidence: {stage.confidence!r} is out of range: a probability in (0, 1)")
    if stage.gradients not in ("mean", "sum"):
        raise UserError(f"{name}.gradients: {stage.gradients!r} is not known: use mean or sum")


def _trials(name: str, stage: StageConfig | SharedStageConfig) -> None:
    """What all stages have."""
    _positive(f"{name}.trials", stage.trials)
    _positive(f"{name}.startup", stage.startup, zero=True)
    _phase(f"{name}.text", stage.text)
    _phase(f"{name}.task", stage.task)


def _phase(name: str, settings: PhaseSettings) -> None:
    if (settings.steps is None) == (settings.epochs is None):
        raise UserError(f"{name}: give exactly one of steps and epochs (set the other to null)")
    if settings.steps is not None:
        _positive(f"{name}.steps", settings.steps, zero=True)
    if settings.epochs is not None:
        _positive(f"{name}.epochs", settings.epochs, zero=True)
    _positive(f"{name}.batch_size", settings.batch_size)
    _positive(f"{name}.accumulate", settings.accumulate)
    if settings.accumulate > settings.batch_size:
        raise UserError(f"{name}.accumulate: {settings.accumulate} parts of {settings.batch_size} sequences: use fewer")
    _positive(f"{name}.lr", settings.lr)
    _positive(f"{name}.clip", settings.clip)
    if not 0 < settings.fraction <= 1:
        raise UserError(f"{name}.fraction: {settings.fraction!r} is out of range: a share in (0, 1]")
    if settings.sources is not None:
        _positive(f"{name}.sources", settings.sources)
        if name.endswith(".task"):
            raise UserError(f"{name}.sources: {settings.sources}: a task has no sources of text: leave it out")
    if not 0 <= settings.warmup_ratio < 1:
        raise UserError(f"{name}.warmup_ratio: {settings.warmup_ratio!r} is out of range: a share in [0, 1)")


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name}: {value!r} is not known: choose one of {', '.join(allowed)}")


def _positive(name: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise UserError(f"{name}: {value!r} is out of range: give a number {'>= 0' if zero else '> 0'}")
