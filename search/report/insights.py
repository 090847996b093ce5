"""Plots of how and why: fronts against every cost, operators of the best, the sampler's tree, latency predictions.

Each returns None without data. Rejected: one figure for all of it; each answers a question of its own, and most runs
have the data for some of them only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture
from search.report.data import RunData, Stage
from search.report.plots import pareto_front
from search.report.theme import BEST, FAINT, INK, MUTED, STAGE_COLORS, STAGE_MARKERS, WIDTH, figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {"flops": ("FLOPs", 1.0), "latency_ms": ("latency, ms", 1.0), "memory_mb": ("peak activations, MiB", 1.0)}
"""Costs a front is drawn for, where trials have them."""
DECILE = 0.1
LEAST = 5
"""Trials the best decile holds, at least."""
MOST_LEVELS = 4
"""Levels of the tree that are drawn; below them nodes are leaves of the drawing."""


def cost_fronts(data: RunData) -> Figure | None:
    """One panel per cost: every candidate, the front of each stage, and answers under other constraints."""
    stages = [s for s in data.stages if s.scored]
    names = [n for n in COSTS if any(len({t.costs.get(n) for t in s.scored} - {None}) > 1 for s in stages)]
    if not names:
        return None
    made = figure(WIDTH, 4.1)
    panels = made.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for panel, name in zip(panels, names, strict=True):
        values = [t.costs[name] for s in stages for t in s.scored if name in t.costs]
        unit, suffix = _unit(name, values)
        limit = data.summary.get("budget", {}).get(name)
        if isinstance(limit, (int, float)):
            panel.axvline(limit / unit, color=MUTED, lw=1, ls=(0, (4, 3)), label="budget")
        for stage in stages:
            _front(panel, stage, name, unit)
        for place, answer in enumerate(data.resolved.values()):
            if name in answer["costs"] and isinstance(answer.get("score"), (int, float)):
                x = answer["costs"][name] / unit
                label = "resolved" if not place else None
                panel.scatter([x], [answer["score"]], s=70, marker="X", color=BEST, edgecolors="white", label=label)
        panel.set_xlabel(COSTS[name][0] + suffix)
        panel.margins(x=0.06, y=0.1)
    panels[0].set_ylabel("score")
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=6, handletextpad=0.3, columnspacing=1.4)
    return made


def operators(data: RunData) -> Figure | None:
    """Per layer the share of the best decile's expressions that hold each operator, and of all, stage by stage."""
    shown = [s for s in data.stages if s.key in ("1", "2") and len(s.scored) >= 2 * LEAST]
    if not shown:
        return None
    counted = [_shares(stage) for stage in shown]
    names = sorted({n for best, everyone, _ in counted for n in everyone}, key=lambda n: (n not in _BINARY, n))
    made = figure(WIDTH, 1.15 + 0.3 * len(names))
    panels = made.subplots(1, 2 * len(shown), squeeze=False, sharey=True)[0]
    image = None
    for place, (stage, (best, everyone, kept)) in enumerate(zip(shown, counted, strict=True)):
        layers = len(next(iter(everyone.values())))
        for panel, shares, title in (
            (panels[2 * place], best, f"{stage.title.partition(':')[0]}: best {kept}"),
            (panels[2 * place + 1], everyone, f"all {len(stage.scored)}"),
        ):
            grid = [[shares.get(name, [0.0] * layers)[layer] for layer in range(layers)] for name in names]
            image = panel.imshow(grid, vmin=0, vmax=1, cmap="Blues", aspect="auto")
            _cells(panel, grid)
            panel.set_title(title)
            panel.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
            panel.set_xlabel("layer")
            panel.grid(visible=False)
            panel.tick_params(length=0)
    panels[0].set_yticks(range(len(names)), names)
    for label in panels[0].get_yticklabels():
        label.set_color(INK)
    assert image is not None  # there is a panel
    bar = made.colorbar(image, ax=list(panels), shrink=0.8, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return made


def partition(data: RunData) -> Figure | None:
    """The learned partition of every stage that has one: good side left, boxes coloured by the mean rank of scores."""
    trees = {key: s["tree"] for key, s in data.samplers.items() if isinstance(s.get("tree"), dict)}
    trees = {key: tree for key, tree in trees.items() if tree.get("children")}
    if not trees:
        return None
    depth = max(min(_depth(tree), MOST_LEVELS) for tree in trees.values())
    made = figure(WIDTH, (0.45 + 0.55 * (depth + 1)) * len(trees))
    panels = made.subplots(len(trees), 1, squeeze=False)[:, 0]
    for panel, (key, tree) in zip(panels, trees.items(), strict=True):
        panel.set_axis_off()
        panel.set_title(f"Stage {key}: {tree['visits']} candidates")
        span = _leaves(tree, MOST_LEVELS)
        panel.set_xlim(0, max(span, 4))
        panel.set_ylim(-min(_depth(tree), MOST_LEVELS) - 0.5, 0.5)
        _branch(panel, tree, 0.0 if span >= 4 else (4 - span) / 2, 0)
    return made


def latency(data: RunData) -> Figure | None:
    """Predicted against measured latency: the table's check, and models that were really exported."""
    table = data.latency
    if table is None or table.check is None:
        return None
    made = figure(WIDTH, 4.0)
    left, right = made.subplots(1, 2, width_ratios=(1.15, 1))
    points = list(table.check.pairs)
    models = [("found", data.summary["latency"])] if isinstance(data.summary.get("latency"), dict) else []
    models += [(name, answer["latency"]) for name, answer in data.resolved.items() if "latency" in answer]
    every = [*points, *((m["predicted_ms"], m["measured_ms"]) for _, m in models)]
    low, high = 0.9 * min(map(min, every)), 1.05 * max(map(max, every))
    left.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color=FAINT, alpha=0.6, lw=0)
    left.plot([low, high], [low, high], color=MUTED, lw=1)
    left.scatter(*zip(*points, strict=True), s=24, color=STAGE_COLORS["1"], alpha=0.65, lw=0, label="random")
    for place, (_, m) in enumerate(models):
        label = "exported models" if not place else None
        left.scatter([m["predicted_ms"]], [m["measured_ms"]], s=130, marker="*", color=BEST, ec="white", label=label)
    left.set(xlim=(low, high), ylim=(low, high), xlabel="predicted, ms", ylabel="measured, ms")
    left.set_title(f"Rank correlation {table.check.rank_correlation:.3f}{'' if table.fit() else ' (unfit)'}")
    left.legend(loc="upper left", handletextpad=0.3)
    errors = sorted(100 * (p - m) / m for p, m in points)
    right.hist(errors, bins=15, color=STAGE_COLORS["1"], alpha=0.75, edgecolor="white")
    right.axvline(0, color=MUTED, lw=1)
    right.set_title(f"Error {table.check.mean_error:.1%} on average, {table.check.worst_error:.1%} at worst")
    right.set(xlabel="(predicted - measured) / measured, %", ylabel="architectures")
    right.grid(axis="x", visible=False)
    return made


_BINARY = ("add", "mul", "max")


def _front(panel: Axes, stage: Stage, name: str, unit: float) -> None:
    points = [(t.costs[name] / unit, t.score) for t in stage.scored if name in t.costs and t.score is not None]
    if not points:
        return
    color = STAGE_COLORS[stage.key]
    label = stage.title.partition(":")[0] if stage.key != "random" else "Random search"
    costs, scores = [cost for cost, _ in points], [score for _, score in points]
    panel.scatter(costs, scores, s=20, marker=STAGE_MARKERS[stage.key], color=color, alpha=0.4, lw=0, label=label)
    front = pareto_front(points)
    panel.step(*zip(*front, strict=True), where="post", color=color, lw=1.6)
    panel.plot(*zip(*front, strict=True), STAGE_MARKERS[stage.key], color=color, ms=4.5, mec="white", mew=0.6)


def _unit(name: str, values: list[float]) -> tuple[float, str]:
    if name != "flops":
        return 1.0, ""
    return (1e9, " (G)") if max(values) >= 1e9 else (1e6, " (M)")


def _shares(stage: Stage) -> tuple[dict[str, list[float]], dict[str, list[float]], int]:
    """Per operator and layer the share of expressions that hold it: of the best decile, of all; the decile's size."""
    ordered = sorted(stage.scored, key=lambda t: (-(t.score or 0.0), t.number))
    kept = max(LEAST, math.ceil(DECILE * len(ordered)))
    architectures = [Architecture.parse(t.architecture) for t in ordered]
    return _share(architectures[:kept]), _share(architectures), kept


def _share(architectures: list[Architecture]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for architecture in architectures:
        for place, layer in enumerate(architecture.layers):
            for name in {node.op for node in layer.expression.walk() if node.args and node.weight is None}:
                found.setdefault(name, [0.0] * len(architecture.layers))[place] += 1 / len(architectures)
    return found


def _cells(panel: Axes, grid: list[list[float]]) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            color = "white" if value > 0.6 else INK
            panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)


def _depth(node: dict[str, Any]) -> int:
    return 1 + max(map(_depth, node["children"])) if node.get("children") else 0


def _leaves(node: dict[str, Any], levels: int) -> int:
    if not node.get("children") or levels == 0:
        return 1
    return sum(_leaves(child, levels - 1) for child in node["children"])


def _branch(panel: Axes, node: dict[str, Any], left: float, level: int) -> float:
    """Draws a node and what is below it from x = `left` on; returns where its box is."""
    from matplotlib import colormaps

    children = node.get("children") if level < MOST_LEVELS else None
    places, edge = [], left
    for child in children or ():
        places.append(_branch(panel, child, edge, level + 1))
        edge += _leaves(child, MOST_LEVELS - level - 1)
    x = sum(places) / 2 if places else left + 0.5
    for place in places:
        panel.plot([x, place], [-level - 0.24, -level - 0.76], color=FAINT, lw=1.4, zorder=0)
    shade = colormaps["Blues"](0.08 + 0.5 * min(max(float(node["mean"]), 0.0), 1.0))
    panel.text(
        x,
        -level,
        f"{node['mean']:.2f}  ({node['visits']})",
        ha="center",
        va="center",
        fontsize=8,
        color=INK,
        bbox={"boxstyle": "round,pad=0.35", "facecolor": shade, "edgecolor": "white"},
    )
    if children and level < 3:
        strongest = node["features"][0]
        sign = "+" if strongest["share"] > 0 else "−"
        panel.text(
            x,
            -level - 0.44,
            f"{sign} {shorten(strongest['name'], 24)}",
            ha="center",
            va="center",
            fontsize=7,
            color=MUTED,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
        )
    return x
