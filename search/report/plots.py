"""Plots of a search: scores over trials, parameters against scores, losses, time. Each returns None without data.

Scores of different stages are not comparable (stage 3 scores with shared weights, without training), so each stage has
its own panel or its own front. Rejected: one running best over all stages; it would show progress where only the way
of scoring changed.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.loss_terms import LOGGED
from search.console.phase_names import phase_name
from search.report.data import Curve, Model, RunData, Stage
from search.report.theme import (
    BEST,
    INK,
    MODEL_COLORS,
    MODEL_MARKERS,
    MUTED,
    STAGE_COLORS,
    STAGE_MARKERS,
    TERM_COLORS,
    WIDTH,
    duration,
    figure,
    integer_ticks,
    millions,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PHASES = 12
"""Panels of the loss plot; the phases with most points are shown."""


def score_over_trials(data: RunData) -> Figure | None:
    """One panel per stage: every trial's score, the best so far, failed trials as crosses on the lower edge."""
    stages = [s for s in data.stages if s.scored]
    if not stages:
        return None
    columns = min(len(stages), 2)
    rows = math.ceil(len(stages) / columns)
    made = figure(WIDTH, 2.9 * rows)
    panels = made.subplots(rows, columns, squeeze=False, sharey=_comparable(stages)).ravel()
    for panel in panels[len(stages) :]:
        panel.set_axis_off()
    for panel, stage in zip(panels, stages, strict=False):
        _scores(panel, stage)
    for panel in panels[::columns]:
        panel.set_ylabel(_score_label(data))
    return made


def pareto(data: RunData) -> Figure | None:
    """Left: candidates' parameters and scores with each stage's front; right: the finished models."""
    stages = [s for s in data.stages if s.scored]
    models = [m for m in data.models if m.metric is not None]
    if not stages and not models:
        return None
    both = bool(stages) and bool(models)
    made = figure(WIDTH, 4.2)
    panels = list(made.subplots(1, 1 + both, squeeze=False)[0])
    if stages:
        _fronts(panels[0], data, stages)
    if models:
        _finished(panels[-1], models)
    return made


def losses(data: RunData) -> Figure | None:
    """Small panels, one per phase: every loss term over optimizer steps."""
    usable = {name: c for name, c in data.curves.items() if len(c.term("total")[0]) > 0}
    chosen = set(sorted(usable, key=lambda n: -len(usable[n].points))[:MAX_PHASES])
    phases = {name: c for name, c in usable.items() if name in chosen}
    if not phases:
        return None
    columns = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3, 9: 3}.get(len(phases), 4)
    rows = math.ceil(len(phases) / columns)
    made = figure(WIDTH, 2.3 * rows + 0.45)
    panels = made.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(phases) :]:
        panel.set_axis_off()
    for panel, (name, curve) in zip(panels, phases.items(), strict=False):
        _curve(panel, name, curve)
    for panel in panels[max(0, len(phases) - columns) : len(phases)]:
        panel.set_xlabel("optimizer step")
    shown = {line.get_label(): line for panel in panels for line in panel.get_lines()}
    made.legend(
        [shown[t] for t in LOGGED if t in shown],
        [t for t in LOGGED if t in shown],
        loc="outside upper left",
        ncols=4,
        fontsize=9.5,
    )
    return made


def time_per_phase(data: RunData) -> Figure | None:
    """Horizontal bars in the order of the run; phases below half a percent are summed up."""
    seconds = {k: v for k, v in data.seconds.items() if v > 0}
    total = sum(seconds.values())
    if not total:
        return None
    small = [name for name, value in seconds.items() if value < 0.005 * total]
    bars = {k: v for k, v in seconds.items() if k not in small}
    if small:
        bars[f"{len(small)} shorter phases"] = sum(seconds[k] for k in small)
    made = figure(WIDTH, 0.75 + 0.31 * len(bars))
    panel = made.subplots()
    names, values = [shorten(phase_name(n), 56) for n in bars], list(bars.values())
    unit, unit_name = next(
        (u, n) for u, n in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if max(values) >= 2 * u or u == 1
    )
    panel.barh(range(len(bars)), [v / unit for v in values], height=0.66, color=[_phase_color(n) for n in bars])
    panel.set_yticks(range(len(bars)), names)
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    for place, value in enumerate(values):
        panel.annotate(
            f"{duration(value)}  ({_percent(value / total)})",
            (value / unit, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    panel.set_xlim(0, max(values) / unit * 1.25)
    panel.set_xlabel(f"{unit_name} (total {duration(total)})")
    panel.tick_params(axis="y", length=0, labelcolor=INK)
    panel.spines["left"].set_visible(False)
    return made


def _scores(panel: Axes, stage: Stage) -> None:
    color = STAGE_COLORS[stage.key]
    scored, failed = stage.scored, [t.number for t in stage.trials if t.score is None]
    numbers, scores = [t.number for t in scored], [score for _, score in stage.points]
    crowded = len(scored) > 150
    panel.scatter(numbers, scores, s=14 if crowded else 26, color=color, alpha=0.5, linewidths=0, label="trial")
    best = [max(scores[: i + 1]) for i in range(len(scores))]
    panel.step(
        [*numbers, stage.trials[-1].number], [*best, best[-1]], where="post", color=color, lw=1.8, label="best so far"
    )
    winner = next((t for t in scored if t.number == stage.best), None)
    if winner is not None and winner.score is not None:
        panel.scatter([winner.number], [winner.score], s=130, marker="*", color=BEST, edgecolors="white", zorder=5)
        left = winner.number > (stage.trials[0].number + stage.trials[-1].number) / 2
        panel.annotate(
            f"{winner.score:.4g}",
            (winner.number, winner.score),
            xytext=(-8 if left else 8, 5),
            textcoords="offset points",
            ha="right" if left else "left",
            color=BEST,
            fontsize=9.5,
            fontweight="bold",
        )
    if failed:
        panel.plot(
            *(failed, [0.02] * len(failed)),
            "x",
            color="#B22222",
            ms=5,
            mew=1.3,
            transform=panel.get_xaxis_transform(),
            label=f"failed ({len(failed)})",
        )
        panel.legend(loc="lower right", handletextpad=0.3, handles=panel.get_lines()[-1:])
    panel.set_title(stage.title)
    panel.set_xlabel("trial")
    panel.margins(x=0.04, y=0.14)
    integer_ticks(panel)


def _fronts(panel: Axes, data: RunData, stages: list[Stage]) -> None:
    low, high = data.summary.get("budget", {}).get("params", (None, None))
    unit, name = _unit([t.params for s in stages for t in s.scored])
    if low is not None:
        panel.axvspan(low / unit, high / unit, color="#8894a6", alpha=0.10, lw=0, label="budget")
    for stage in stages:
        color = STAGE_COLORS[stage.key]
        points = stage.points
        x, y = [p / unit for p, _ in points], [s for _, s in points]
        label = stage.title.partition(":")[0] if stage.key != "random" else "Random search"
        panel.scatter(x, y, s=20, marker=STAGE_MARKERS[stage.key], color=color, alpha=0.45, linewidths=0, label=label)
        front = pareto_front(points)
        panel.step([p / unit for p, _ in front], [s for _, s in front], where="post", color=color, lw=1.6)
        winner = next((t for t in stage.scored if t.number == stage.best), None)
        if winner is not None and winner.score is not None and stage.key != "random":
            panel.scatter(
                [winner.params / unit], [winner.score], s=150, marker="*", color=color, edgecolors=INK, lw=0.9, zorder=5
            )
    panel.set_title("Candidates during the search")
    panel.set_xlabel(f"parameters{name}")
    panel.set_ylabel(_score_label(data))
    panel.margins(x=0.06, y=0.1)
    _legend_below(panel, columns=3)


def _finished(panel: Axes, models: list[Model]) -> None:
    unit, name = _unit([m.params for m in models])
    for model in models:
        panel.scatter(
            [model.params / unit],
            [model.score],
            s=300 if model.kind == "best" else 90,
            marker=MODEL_MARKERS[model.kind],
            color=MODEL_COLORS[model.kind],
            edgecolors="white",
            lw=0.8,
            zorder=4 if model.kind == "best" else 3,
        )
    panel.margins(x=0.18, y=0.22)
    _label(panel, models, unit)
    first = models[0].metric
    panel.set_title("Finished models")
    panel.set_xlabel(f"parameters{name}")
    if first is not None:
        panel.set_ylabel(f"{first.name} on {first.split}")


def _label(panel: Axes, models: list[Model], unit: float) -> None:
    """Names beside their points, on the side with more room, pushed up where they would cover each other."""
    made: Any = panel.figure  # the whole figure: panels of ours lie in no other
    made.draw_without_rendering()
    point = made.dpi / 72
    box = panel.get_window_extent()
    placed: list[tuple[float, float, float]] = []
    spots = [(*panel.transData.transform((m.params / unit, m.score)), m) for m in models]
    for x, y, model in sorted(spots, key=lambda s: s[1]):
        right = x < (box.x0 + box.x1) / 2
        width = 4.9 * point * max(len(shorten(model.name, 30)), 12)
        left_edge = x + 12 * point if right else x - 12 * point - width
        place = y
        for low, high, taken in placed:  # from the lowest up
            if left_edge < high and low < left_edge + width and abs(place - taken) < 26 * point:
                place = taken + 26 * point
        placed.append((left_edge, left_edge + width, place))
        panel.annotate(
            f"{shorten(model.name, 30)}\n{model.metric.value:.4g}, {millions(model.params)}",
            (model.params / unit, model.metric.value),
            xytext=(12 if right else -12, (place - y) / point),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8.8,
            linespacing=1.25,
            color=MODEL_COLORS[model.kind] if model.kind != "baseline" else MUTED,
            fontweight="bold" if model.kind == "best" else "normal",
        )


def _curve(panel: Axes, name: str, curve: Curve) -> None:
    largest, smallest = 0.0, math.inf
    for term in LOGGED:
        steps, values = curve.term(term)
        if not steps or (term != "total" and not any(values)):
            continue
        marker = "o" if len(steps) <= 12 else None
        panel.plot(
            steps, values, color=TERM_COLORS[term], lw=1.9 if term == "total" else 1.2, marker=marker, ms=3, label=term
        )
        largest, smallest = max(largest, *values), min(smallest, *values)
    if smallest > 0 and largest > 30 * smallest:
        panel.set_yscale("log")
    elif smallest >= 0:
        panel.set_ylim(bottom=0)
    panel.set_title(textwrap.fill(shorten(phase_name(name), 56), 28), fontsize=9.5)
    integer_ticks(panel)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points no other beats: fewer (or equal) parameters and a higher score; by parameters, ascending."""
    front: list[tuple[float, float]] = []
    for params, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((params, score))
    return front


def _comparable(stages: list[Stage]) -> bool:
    """Whether one scale serves all stages: no stage's scores would be squeezed into a third of it."""
    scores = [[score for _, score in s.points] for s in stages]
    spans = [(min(found), max(found)) for found in scores]
    whole = max(h for _, h in spans) - min(low for low, _ in spans)
    return all(3 * (high - low) >= whole for low, high in spans)


def _unit(params: list[int]) -> tuple[float, str]:
    return (1e6, " (millions)") if max(params) >= 1e6 else (1e3, " (thousands)")


def _score_label(data: RunData) -> str:
    return f"{data.score} on score split" if data.score else "score"


def _legend_below(panel: Axes, columns: int) -> None:
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns, handletextpad=0.3, columnspacing=1.2)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def _phase_color(name: str) -> str:
    for key, color in STAGE_COLORS.items():
        if name.startswith((f"stage{key}", "random") if key == "random" else f"stage{key}"):
            return color
    return BEST if name.startswith("derive") else "#8FA3BF"
