"""The found architecture, drawn layer by layer beside its teacher.

Bottom to top as data flows: one row per student layer with its attention block, its n FFNs (each a box as tall as its
ratio) and their expression; the teacher's layers on the left, an arrow from every one that a student layer is
distilled from. Rejected: graphviz; a binary the user would have to install, for boxes on a grid.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.architecture.architecture import Architecture, LayerSpec
from search.report.theme import FAINT, INK, MUTED, TEACHER, WIDTH, figure, millions, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ATTENTION, FFN = "#56B4E9", "#E69F00"
MAX_BOXES = 6
"""FFNs drawn one by one; a larger stack is one box with its number."""

_TEACHER_X, _TEACHER_W = 0.0, 1.9
_ATTENTION_X, _ATTENTION_W = 3.5, 1.35
_FFN_X, _FFN_W, _FFN_GAP = 5.1, 0.52, 0.1
_TEXT_FITS = ((56, 2, 8.6), (64, 3, 7.6), (74, 4, 6.6))
"""(characters a line, lines, font size) an expression may take, largest first."""


def draw_architecture(
    architecture: Architecture,
    *,
    hidden_size: int,
    params: int | None = None,
    teacher: str | None = None,
    teacher_layers: int | None = None,
    layer_map: Sequence[int] | None = None,
) -> Figure:
    """Draws an architecture.

    Args:
        architecture: what was found.
        hidden_size: H of the student.
        params: its parameter count, shown in the heading.
        teacher: the teacher's name; without it and `teacher_layers` the student is drawn alone.
        teacher_layers: number of its layers.
        layer_map: teacher layer (0-based) that each student layer is distilled from.
    """
    layers = architecture.layers
    boxes = max(1 if s.stack > MAX_BOXES else s.stack for s in layers)
    text_x = _FFN_X + boxes * (_FFN_W + _FFN_GAP) + 0.15
    width = text_x + 5.9
    made = figure(WIDTH, 0.62 * (len(layers) + 2) + 0.1)
    panel = made.subplots()
    panel.set_axis_off()
    panel.set_xlim(-0.1 if teacher_layers else _ATTENTION_X - 0.9, width)
    panel.set_ylim(-0.7, len(layers) + 1.05)
    size = f", {millions(params)} parameters" if params is not None else ""
    _heading(panel, _ATTENTION_X - 0.36, len(layers), "Student", f"{len(layers)} layers, H = {hidden_size}{size}")
    _heading(panel, text_x, len(layers), "Expression", "what each FFN of the stack computes")
    for index, spec in enumerate(layers):
        _student_layer(panel, index, spec, text_x, len(layers))
    _box(panel, _ATTENTION_X, -0.3, _ATTENTION_W, 0.5, "embedding", FAINT)
    if teacher_layers:
        _teacher(panel, teacher or "teacher", teacher_layers, len(layers), layer_map)
    return made


def _student_layer(panel: Axes, index: int, spec: LayerSpec, text_x: float, count: int) -> None:
    y = index + 0.5
    panel.text(_ATTENTION_X - 0.18, y, str(index + 1), ha="right", va="center", fontsize=9.5, color=MUTED)
    _arrow(panel, (_ATTENTION_X + _ATTENTION_W / 2, y - 0.74), (_ATTENTION_X + _ATTENTION_W / 2, y - 0.26))
    if spec.heads != 0:
        label = "attention" if spec.heads is None else f"{spec.heads} heads"
        _box(panel, _ATTENTION_X, y, _ATTENTION_W, 0.5, label, ATTENTION)
    shown = 1 if spec.stack > MAX_BOXES else spec.stack
    for place in range(shown):
        x = _FFN_X + place * (_FFN_W + _FFN_GAP)
        height = 0.26 + 0.54 * float(spec.ratio)
        label = str(spec.ratio) if shown == spec.stack else f"{spec.stack}×"
        _box(panel, x, y, _FFN_W, height, label, FFN, size=8.5)
    if shown:
        panel.plot([_ATTENTION_X + _ATTENTION_W, _FFN_X], [y, y], color=MUTED, lw=1, zorder=1)
    if shown > 1:
        panel.plot([_FFN_X, _FFN_X + shown * (_FFN_W + _FFN_GAP) - _FFN_GAP], [y, y], color=MUTED, lw=1, zorder=1)
    text, size = _wrapped(str(spec.expression) if spec.stack else "left out" if spec.skipped else "no FFN")
    panel.text(text_x, y, text, va="center", family="monospace", fontsize=size, linespacing=1.25, color=INK)
    if index < count - 1:
        panel.axhline(index + 1, xmin=0.0, color=FAINT, lw=0.5, zorder=0)


def _wrapped(expression: str) -> tuple[str, float]:
    """The expression over a few lines and its font size; what does not fit at the smallest size is cut."""
    for chars, limit, size in _TEXT_FITS:
        lines = textwrap.wrap(expression.replace(",", ", "), chars)
        if len(lines) <= limit:
            return "\n".join(lines), size
    return "\n".join([*lines[: limit - 1], shorten(" ".join(lines[limit - 1 :]), chars)]), size


def _teacher(panel: Axes, name: str, layers: int, student_layers: int, layer_map: Sequence[int] | None) -> None:
    pitch = student_layers / layers
    height = min(0.5, 0.74 * pitch)
    _heading(panel, _TEACHER_X, student_layers, "Teacher", shorten(name, 30))
    used = set(layer_map or ())
    centre = [pitch * (i + 0.5) for i in range(layers)]
    for index, y in enumerate(centre):
        strong = not used or index in used
        label = f"layer {index + 1}" if height > 0.16 else ""
        _box(
            panel, _TEACHER_X, y, _TEACHER_W, height, label, TEACHER if strong else FAINT, size=9 if height > 0.3 else 7
        )
    _box(panel, _TEACHER_X, -0.3, _TEACHER_W, 0.5, "embedding", FAINT)
    if layer_map is None:
        return
    right, left = _TEACHER_X + _TEACHER_W, _ATTENTION_X - 0.48
    _arrow(panel, (right + 0.06, -0.3), (left + 0.42, -0.3), color=TEACHER)
    for student, source in enumerate(layer_map):
        _arrow(panel, (right + 0.06, centre[source]), (left, student + 0.5), color=TEACHER)


def _box(panel: Axes, x: float, y: float, width: float, height: float, text: str, color: str, size: float = 9) -> None:
    """A rounded box, its left edge at `x`, centred on `y`."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import FancyBboxPatch

    panel.add_patch(
        FancyBboxPatch(
            (x, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.07",
            facecolor="#f4f6f9" if color == FAINT else _pale(color),
            edgecolor="#aab2bf" if color == FAINT else to_rgba(color),
            linewidth=1.1,
            zorder=2,
        )
    )
    panel.text(x + width / 2, y, text, ha="center", va="center_baseline", fontsize=size, color=INK, zorder=3)


def _pale(color: str) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    return tuple(1 - 0.28 * (1 - c) for c in to_rgb(color))


def _arrow(panel: Axes, start: tuple[float, float], end: tuple[float, float], color: str = MUTED) -> None:
    panel.annotate(
        "",
        end,
        start,
        arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.1, "shrinkA": 0, "shrinkB": 0},
        zorder=1,
    )


def _heading(panel: Axes, x: float, layers: int, title: str, text: str) -> None:
    panel.text(x, layers + 0.8, title, ha="left", va="center", fontsize=10.5, fontweight="bold", color=INK)
    panel.text(x, layers + 0.46, text, ha="left", va="center", fontsize=9, color=MUTED)
