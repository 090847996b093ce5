"""report.html: one self-contained page of a run, its plots embedded as PNG and also written to plots/.

A section whose data are missing is left out. Everything shown is escaped by the template, so that names, reasons and
configuration can hold any character. Rejected: an interactive plotting library; its megabytes of script in every
report would buy little over a picture and a table.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import write_text_atomic
from search.report.answers import confusions
from search.report.data import Model, RunData, read_run
from search.report.drawing import draw_architecture
from search.report.evidence import intervals
from search.report.insights import cost_fronts, latency, operators, partition
from search.report.plots import losses, pareto, score_over_trials, time_per_phase
from search.report.tables import COSTS
from search.report.theme import duration, millions, save, shorten, style
from search.space.costs import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")


@dataclass(frozen=True)
class Plot:
    """A plot of the report.

    Attributes:
        name: of its file in plots/ and of its place in the template.
        caption: below it.
        draw: draws it from the data, or returns None where there are none.
    """

    name: str
    caption: str
    draw: Callable[[RunData], Figure | None]


def architecture(data: RunData) -> Figure | None:
    """The found architecture beside its teacher."""
    if data.architecture is None or data.hidden_size is None:
        return None
    teacher = data.teacher
    count, depth = len(data.architecture.layers), teacher.layers if teacher is not None else None
    mapping = data.summary.get("inherit", {}).get("layers")
    if mapping is None and depth is not None and depth >= count:
        from engine.objective import layer_map  # deferred: it loads torch

        mapping = layer_map(count, depth)
    return draw_architecture(
        data.architecture,
        hidden_size=data.hidden_size,
        params=data.params,
        teacher=teacher.name.removeprefix("Teacher: ") if teacher is not None else None,
        teacher_layers=depth,
        layer_map=mapping,
    )


PLOTS = (
    Plot(
        "evidence",
        "Points are measurements, lines their intervals. Right: where a line does not touch 0, the found model is"
        " better (right of 0) or worse (left of it) than that model by more than the choice of rows explains.",
        lambda data: intervals(data.evidence),
    ),
    Plot(
        "confusions",
        "How many rows of each label (from left to right) got each answer; the diagonal is right. Shades are shares of"
        " a label's rows.",
        lambda data: confusions(data.evidence.answers if data.evidence is not None else None),
    ),
    Plot(
        "architecture",
        "The found architecture, input at the bottom. Each box after an attention block is one FFN of its stack, as"
        " tall as its expansion ratio; the expression is what replaces the usual GELU FFN. Arrows: which teacher layer"
        " each student layer is distilled from.",
        architecture,
    ),
    Plot(
        "pareto",
        "Left: every candidate with the front of each stage; stars are the stages' winners, the shaded band is the"
        " budget. Scores are of short trainings (stage 3: of shared weights, without training), on a part of the"
        " training data held out for scoring. Right: the finished models after full distillation.",
        pareto,
    ),
    Plot(
        "score_over_trials",
        "Score of each candidate in the order of evaluation, with the best so far; the star is the stage's winner."
        " Scores of stage 3 (shared weights, no training) are not comparable with those of the other stages.",
        score_over_trials,
    ),
    Plot(
        "cost_fronts",
        "Score against every other cost, with the front of each stage (stages score differently, so only points of one"
        " colour compare). Costs are predicted: FLOPs and memory by formula, latency from the table.",
        cost_fronts,
    ),
    Plot(
        "operators",
        "How often an operator occurs in a layer's expression, in percent: among a stage's best tenth of candidates,"
        " and among all of them. An operator the best have more often than all is one the search likes.",
        operators,
    ),
    Plot(
        "partition",
        "How the sampler parts the space: in each box the mean rank of the candidates' scores (1 is best) and, in"
        " brackets, their number; the better half is on the left. Below a box the feature that weighs most in it,"
        " with its sign on the good side.",
        partition,
    ),
    Plot(
        "latency",
        "Left: predicted against measured latency of random architectures that the table was not made from, and of"
        " exported models; the band is 10 %. Right: the errors.",
        latency,
    ),
    Plot("losses", "Distillation losses over optimizer steps, phase by phase.", losses),
    Plot("time_per_phase", "Wall time of each phase.", time_per_phase),
)


def build_report(run_dir: str | os.PathLike[str]) -> Path:
    """Builds report.html and plots/*.png of a run directory from its files, finished or not.

    Returns:
        The path of report.html.

    Raises:
        UserError: there is no run, or one of its files is damaged.
    """
    path = Path(run_dir)
    data = read_run(path)
    images = {}
    with style():
        for plot in PLOTS:
            drawn = plot.draw(data)
            if drawn is not None:
                file = path / "plots" / f"{plot.name}.png"
                save(drawn, file)
                images[plot.name] = (base64.b64encode(file.read_bytes()).decode("ascii"), plot.caption)
    report = path / "report.html"
    write_text_atomic(report, _render(data, images))
    return report


def _render(data: RunData, images: dict[str, tuple[str, str]]) -> str:
    import jinja2  # deferred: only reports need it

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(millions=millions, duration=duration, shorten=shorten)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=data.title,
        name=data.path.resolve().name,
        images=images,
        finished=bool(data.summary),
        cards=_cards(data),
        evidence=data.evidence,
        models=data.models,
        metrics=_metric_names(data.models),
        teacher=data.teacher,
        layers=data.architecture.layers if data.architecture is not None else (),
        stages=data.stages,
        failures=_failures(data),
        duplicates=data.summary.get("trials", {}).get("duplicates"),
        facts=_facts(data),
        versions=data.summary.get("versions", {}),
        notes=data.summary.get("notes", []),
        config=data.config,
        resolved=_resolved(data),
        table=str(data.latency.conditions) if data.latency is not None else "",
    )


def _metric_names(models: list[Model]) -> list[str]:
    """Metrics of the models, the primary one first."""
    names = [m.metric.name for m in models if m.metric is not None]
    return list(dict.fromkeys([*names[:1], *(n for m in models for n in m.metrics)]))


def _failures(data: RunData) -> list[tuple[str, int]]:
    """Reasons of failed trials over all stages, most frequent first."""
    total: Counter[str] = Counter()
    for stage in data.stages:
        total.update(stage.failures)
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))


def _resolved(data: RunData) -> list[dict[str, Any]]:
    """Answers under other constraints: budget, score, costs, latency."""
    rows = []
    for name, answer in data.resolved.items():
        took = answer.get("latency")
        measured = f"{took['measured_ms']:.3g} ms" if took is not None else "–"
        costs = {cost: text(cost, value) for cost, value in answer["costs"].items()}
        rows.append({"name": name, "metric": f"{answer['metric']['value']:.4f}", "measured": measured, "costs": costs})
    return rows


def _cards(data: RunData) -> list[dict[str, str]]:
    """The numbers a reader looks for first: value, what it is, and a remark."""
    cards = []
    best, teacher = data.best, data.teacher
    if best is not None and best.metric is not None:
        note = f"on {best.metric.split}"
        if teacher is not None and teacher.metric is not None:
            note = f"teacher {teacher.metric.value:.4f}, both on {best.metric.split}"
        cards.append({"value": f"{best.metric.value:.4f}", "label": best.metric.name, "note": note})
    if best is not None:
        note = f"{millions(best.deployed)} deployed" if best.deployed != best.params else ""
        if teacher is not None:
            note = f"{teacher.params / best.deployed:.1f} times fewer than the teacher when deployed"
        cards.append({"value": millions(best.params), "label": "parameters", "note": note})
    for baseline in data.baselines:
        if best is not None and best.metric is not None and baseline.metric is not None:
            cards.append(
                {
                    "value": f"{best.metric.value - baseline.metric.value:+.4f}",
                    "label": f"against {baseline.name[0].lower()}{baseline.name[1:]}",
                    "note": f"{baseline.metric.value:.4f} at {millions(baseline.params)}",
                }
            )
    took = data.summary.get("latency")
    if isinstance(took, dict):
        note = f"{took['predicted_ms']:.3g} ms predicted; {took['conditions'].split(', fp32')[0]}"
        cards.append({"value": f"{took['measured_ms']:.3g} ms", "label": "latency", "note": note})
    trials = sum(len(s.trials) for s in data.stages if s.key != "random")
    if trials:
        failed = sum(t.state == "failed" for s in data.stages if s.key != "random" for t in s.trials)
        note = " + ".join(str(len(s.trials)) for s in data.stages if s.key != "random")
        cards.append({"value": str(trials), "label": "candidates", "note": f"{note}, {failed} failed"})
    if data.seconds:
        device = data.summary.get("device", "")
        note = f"on {device}, baselines included" if device else "baselines included"
        cards.append({"value": duration(sum(data.seconds.values())), "label": "wall time", "note": note})
    return cards


def _facts(data: RunData) -> list[tuple[str, str]]:
    """Name and value of what the run was made with."""
    summary = data.summary
    facts = []
    task = summary.get("task", {})
    if "name" in task:
        rows = task.get("rows", {})
        counts = ", ".join(f"{v} {k}" for k, v in rows.items()) if isinstance(rows, dict) else ""
        facts.append(("task", f"{task['name']}" + (f" ({counts})" if counts else "")))
    low_high = summary.get("budget", {}).get("params")
    if low_high:
        facts.append(("budget", f"{low_high[0]:,.0f} to {low_high[1]:,.0f} parameters".replace(",", " ")))
    for name in COSTS:
        if isinstance(summary.get("budget", {}).get(name), (int, float)):
            facts.append(("budget", f"at most {text(name, summary['budget'][name])}"))
    facts += [(key, str(summary[key])) for key in ("device", "backend", "precision", "seed") if key in summary]
    return facts
