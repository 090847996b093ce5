"""A whole search, from teacher to report: the order of phases and what each hands to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.architecture.architecture import Architecture
from engine.architecture.file import architecture_from_dict, architecture_to_dict, save_architecture
from engine.evaluation.evaluation import evaluate_dev
from engine.evaluation.metrics import primary
from engine.export.export import export_model, rewrite_card
from engine.files import write_json_atomic
from engine.objective import layer_map
from engine.teacher import Teacher
from engine.teacher.finetune import finetune
from engine.training.checkpoint import load_weights, save_weights
from engine.training.sentinel import check_teacher
from search.baselines import derive_baseline, hand_designed, random_search
from search.console.progress import Reporter
from search.context import Context, Prepared, teacher_cache
from search.derive import Derived, derive
from search.evidence import Subject, gather_run
from search.finished import remove_spent
from search.inherit.last_round import STAGE as ROUND
from search.inherit.library import STAGE as LIBRARY
from search.inherit.strategy import find, how_inherited
from search.report import build_report
from search.report.card import architecture_png, card_facts
from search.report.tables import write_candidates
from search.report.titles import teacher_name
from search.scoring.trials import TrialLog
from search.stages import stage1, stage2, stage3, stage3_supernet, warm_up
from search.summary import latency_line, summarise
from search.tracking import Scalars

TEACHER = Path("checkpoints") / "teacher.safetensors"
"""The fine-tuned teacher in the run directory, for workers that join; written where the ledger is shared."""


def run(ctx: Context) -> dict[str, Any]:
    """Carries out every phase that is not finished yet; returns the summary.

    Everything a finished phase produced is read back from the run directory, so calling this again after any
    interruption continues the run.
    """
    config, ranks = ctx.config, ctx.ranks
    with ctx.timed("teacher"):
        share_teacher(ctx)
    _check_answers(ctx)
    if ctx.ledger.shared and ranks.is_first:
        save_weights(ctx.rundir.path / TEACHER, ctx.teacher.model)
    teacher_metrics: dict[str, float] = {}
    teacher_rows: list[np.ndarray] = []
    if ranks.is_first:
        with ctx.timed("teacher evaluation"):
            teacher_metrics = evaluate_dev(
                ctx.teacher.model, ctx.data, precision=config.teacher_precision, keep=teacher_rows.append
            )
        ctx.reporter.info(score_line("teacher", ctx, teacher_metrics))

    return (_inherit if ctx.inherits else _three_stages)(ctx, teacher_metrics, teacher_rows)


def _inherit(ctx: Context, teacher_metrics: dict[str, float], teacher_rows: list[np.ndarray]) -> dict[str, Any]:
    """Strategy inherit (`search.inherit`)."""
    best, finished, facts = find(ctx)
    if teacher_rows:
        rows = {name: derived.rows for name, derived in finished.items() if derived.rows is not None}
        facts["divergence"] = {name: apart(ctx, own, teacher_rows[0]) for name, own in rows.items()}
    stages = {}
    for name in (LIBRARY, ROUND):
        stages[name] = TrialLog()
        stages[name].add(ctx.ledger.trials(name))
        (ctx.rundir.path / name).mkdir(exist_ok=True)
        write_candidates(ctx.rundir.path / name / "candidates.csv", stages[name].trials)
    told = how_inherited(facts)
    export(ctx, best, told)
    ctx.reporter.info(score_line("found model", ctx, best.dev))
    apart_by = ", ".join(f"{name} {value:.4f}" for name, value in facts.get("divergence", {}).items())
    ctx.reporter.info(f"mean divergence from the teacher on dev: {apart_by}")
    baselines = {name: derived for name, derived in finished.items() if (name, facts["chosen"]) != ("search", "search")}
    for name, derived in baselines.items():
        ctx.reporter.info(score_line(f"baseline {name}", ctx, derived.dev))
    return _finish(ctx, best, baselines, teacher_metrics, teacher_rows, stages, told, inherited_facts(facts))


def apart(ctx: Context, rows: np.ndarray, wanted: np.ndarray) -> float:
    """Mean KL divergence of answers [N, C] to dev from the teacher's (regression: mean squared difference).

    Tells students apart whose accuracy is the same to within chance.
    """
    own, answers = torch.from_numpy(rows), torch.from_numpy(wanted)
    return float(ctx.spec.head.divergence(own, answers).mean())


def inherited_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts of strategy inherit as summary.json holds them: the latency where that of the other strategy stands."""
    own = {key: value for key, value in facts.items() if key != "latency"}
    return {"inherit": own, **({"latency": facts["latency"]} if "latency" in facts else {})}


def _three_stages(ctx: Context, teacher_metrics: dict[str, float], teacher_rows: list[np.ndarray]) -> dict[str, Any]:
    """The paper's strategy: warm-up, three stages, derive, baselines.

    Supernets and the found model are trained by all ranks together; candidates are divided among them.
    """
    ranks = ctx.ranks
    stages: dict[str, TrialLog] = {}
    supernet = warm_up(ctx)
    shapes = _winner(ctx, stages, "1", lambda: stage1(ctx, supernet))
    expressions = _winner(ctx, stages, "2", lambda: stage2(ctx, supernet, shapes))
    ctx.proxy_targets.clear()  # gigabytes that stage 3 may need
    shared, space = stage3_supernet(ctx, supernet, expressions)
    found = _winner(ctx, stages, "3", lambda: stage3(ctx, shared, space, expressions))

    config = ctx.config
    if config.derive.start == "warmup":
        ranks.first(lambda: load_weights(ctx.rundir.stage(3) / "warmup.safetensors", shared))
        ranks.spread(shared)
    best = derive(ctx, "derive", shared, found)
    ranks.first(lambda: export(ctx, best, how_found(ctx)))
    ctx.reporter.info(score_line("found model", ctx, best.dev))

    baselines: dict[str, Derived] = {}
    if config.baselines.gelu:
        architecture = hand_designed(ctx.space, best.params)
        baselines["gelu"] = derive_baseline(ctx, "gelu", supernet, architecture)
    if config.baselines.random:
        trials = sum(len(log.trials) for log in stages.values())
        winner = _winner(ctx, stages, "random", lambda: random_search(ctx, supernet, trials))
        baselines["random"] = derive_baseline(ctx, "random", supernet, winner)
    for name, derived in baselines.items():
        ctx.reporter.info(score_line(f"baseline {name}", ctx, derived.dev))

    return (
        ranks.first(lambda: _finish(ctx, best, baselines, teacher_metrics, teacher_rows, stages, how_found(ctx), {}))
        or {}
    )


def help_out(ctx: Context) -> None:
    """Evaluates candidates of a search that runs elsewhere (`ctx.joined`), stage by stage, until none are left."""
    ctx.load_joined(TEACHER, ctx.teacher.model)
    stages: dict[str, TrialLog] = {}
    supernet = warm_up(ctx)
    shapes = _winner(ctx, stages, "1", lambda: stage1(ctx, supernet))
    expressions = _winner(ctx, stages, "2", lambda: stage2(ctx, supernet, shapes))
    ctx.proxy_targets.clear()
    shared, space = stage3_supernet(ctx, supernet, expressions)
    _winner(ctx, stages, "3", lambda: stage3(ctx, shared, space, expressions))
    if ctx.config.baselines.random:
        random_search(ctx, supernet, sum(len(log.trials) for log in stages.values()))


def _winner(ctx: Context, stages: dict[str, TrialLog], name: str, search: Callable[[], TrialLog]) -> Architecture:
    """The best candidate of a stage, the same on every rank; its trials go into `stages[name]`."""
    stages[name] = search()
    data = ctx.ranks.agree(lambda: architecture_to_dict(stages[name].best().architecture, ctx.shape))
    return architecture_from_dict(data, shape=ctx.shape)


def _finish(
    ctx: Context,
    best: Derived,
    baselines: dict[str, Derived],
    teacher_metrics: dict[str, float],
    teacher_rows: list[np.ndarray],
    stages: dict[str, TrialLog],
    told: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Evidence, summary, model card (with `told`) and report; `facts` go into the summary."""
    evidence = gather_run(ctx, subjects(ctx, best, baselines, teacher_rows))
    write_card(ctx, best, told, evidence)
    summary = {**summarise(ctx, best, baselines, teacher_metrics, stages), **facts, "evidence": evidence}
    write_json_atomic(ctx.rundir.path / "summary.json", summary)
    track_scores(ctx, teacher_metrics, {"found": best, **baselines})
    if "latency" in summary:
        asked = ctx.config.budget.latency_ms
        ctx.reporter.info(latency_line(summary["latency"], asked, ctx.rundir.path))
    ctx.reporter.doing("drawing the report")
    build_report(ctx.rundir.path)
    remove_spent(ctx.rundir, ctx.config.files, ctx.reporter)
    return summary


def track_scores(ctx: Context, teacher_metrics: dict[str, float], finished: Mapping[str, Derived]) -> None:
    """Final scores of the teacher and of the finished students, for the trackers."""
    if ctx.scalars is not None:
        for name, metrics in {"teacher": teacher_metrics, **{n: d.dev for n, d in finished.items()}}.items():
            ctx.scalars.model(name, metrics)


_TITLES = {
    "gelu": "the hand-designed GELU student",
    "random": "the best of random search",
    "uniform": "the best uniform student",
    "search": "the best solved student",
}


def _title(name: str) -> str:
    """What sentences call a finished student."""
    if name.startswith("encoder-"):
        return f"the student of {name.removeprefix('encoder-')} of the encoder"
    return _TITLES.get(name, name)


def subjects(
    ctx: Context, best: Derived, baselines: dict[str, Derived], teacher_rows: list[np.ndarray]
) -> list[Subject]:
    """The finished models of a run, for the evidence; `teacher_rows` holds the teacher's answers to dev."""
    made = [Subject("found", "found", "found", best.measured_rows, best.model, ctx.rundir.model)]
    made += [Subject(n, _title(n), "baseline", d.measured_rows, d.model) for n, d in baselines.items()]
    made += [Subject("teacher", "its teacher", "teacher", rows, ctx.teacher.model) for rows in teacher_rows]
    return made


def share_teacher(ctx: Context) -> None:
    """Stage 0 on the first rank; the others, whose teacher is still as it was loaded, take over its weights."""
    tuned = ctx.ranks.first(lambda: teach(ctx, ctx.reporter, ctx.scalars))
    if tuned is not None:
        ctx.teacher = tuned
    ctx.ranks.spread(ctx.teacher.model)


def _check_answers(ctx: Context) -> None:
    """Ends the run in one line where the teacher's answers on a first batch are not finite."""
    for data, need_logits in ((ctx.data.text, False), (ctx.data.train, True)):
        batch = next(data.batches(8, seed=0, epoch=0)).to(ctx.device)
        distiller = ctx.distiller("task" if need_logits else "text")
        check_teacher(ctx.config.teacher, distiller.targets(batch, need_logits=need_logits))


def teach(prepared: Prepared, reporter: Reporter, scalars: Scalars | None = None) -> Teacher:
    """Stage 0: the teacher fine-tuned on the task, or found in the cache."""
    config = prepared.config

    def progress(done: int, total: int, **metrics: float) -> None:
        bar.update(done, ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), total=total)
        if scalars is not None:
            scalars.values("teacher", metrics, done)

    with reporter.phase("teacher", 1, most=True) as bar:
        return finetune(
            config.teacher,
            prepared.data,
            config.finetune,
            cache_dir=teacher_cache(),
            device=prepared.device,
            precision=config.teacher_precision,
            progress=progress,
            standard=config.strategy == "inherit",
            published=config.kd.paper_exact,
        )


def how_found(ctx: Context) -> dict[str, Any]:
    """What the model card says about the search."""
    return {
        "sampler": ctx.config.sampler.name,
        "trials": f"{ctx.config.stage1.trials} + {ctx.config.stage2.trials} + {ctx.config.stage3.trials}",
    }


def export(ctx: Context, best: Derived, found: dict[str, Any]) -> None:
    """Writes best/architecture.json and best/model/; `found` is listed in the model card."""
    ctx.reporter.doing("exporting the model")
    config = best.model.config
    save_architecture(config.full_architecture, ctx.rundir.architecture, config.shape)
    drawing = architecture_png(
        best.model.config,
        teacher=teacher_name(ctx.config.teacher),
        teacher_layers=ctx.teacher.num_layers,
        layer_map=config.source_layers or layer_map(config.num_hidden_layers, ctx.teacher.num_layers),
    )
    card = card_facts(ctx, best, found)
    tokenizer = ctx.teacher.tokenizer if best.tokenizer is None else best.tokenizer
    export_model(best.model, tokenizer, ctx.rundir.model, None, card, drawing=drawing)


def write_card(ctx: Context, best: Derived, found: dict[str, Any], evidence: dict[str, Any]) -> None:
    """Writes the model card of best/model/ again, with the evidence, which takes longer to gather than the model."""
    rewrite_card(best.model, ctx.rundir.model, {**card_facts(ctx, best, found), "evidence": evidence})


def score_line(name: str, ctx: Context, metrics: dict[str, float]) -> str:
    """The primary metric on dev, for the log."""
    metric, value = primary(ctx.spec, metrics)
    return f"{name}: {metric} {value:.4f} on dev"
