"""Colours and text sizes of the plots: Okabe and Ito's palette, told apart with any colour vision.

Plots are drawn on white; the report page turns them dark by inverting lightness and keeping hue. Rejected: drawing
each plot twice, once per background; it doubles the time and the size of the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.files import write_atomic
from engine.loss_terms import TERMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.8
"""Inches; one width for all plots, so that text is of one size on the page."""

INK, MUTED, FAINT = "#1c2330", "#667085", "#d9dee7"
STAGE_COLORS = {
    "1": "#0072B2", "2": "#E69F00", "3": "#009E73", "library": "#0072B2", "round": "#009E73", "random": "#7A7F87",
}  # fmt: skip
STAGE_MARKERS = {"1": "o", "2": "s", "3": "^", "library": "o", "round": "^", "random": "D"}
BEST, TEACHER, BASELINE = "#D55E00", "#AA4499", "#7A7F87"
TERM_COLORS = {"total": INK, **{term.name: term.color for term in TERMS}}
MODEL_COLORS = {"best": BEST, "teacher": TEACHER, "baseline": BASELINE}
MODEL_MARKERS = {"best": "*", "teacher": "P", "baseline": "D"}

_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#aab2bf",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 144,
}


@contextmanager
def style() -> Iterator[None]:
    """The settings all plots are drawn with, whatever the user's own configuration says."""
    import matplotlib  # deferred: half a second of import

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, value in _SETTINGS.items():
            matplotlib.rcParams[name] = value  # type: ignore[index]  # names are literals to its stubs
        yield


def figure(width: float, height: float) -> Figure:
    """An empty figure, inches; drawn by Agg, without a display and without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.06)
    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(made)
    return made


def save(made: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all; the same figure gives the same bytes."""
    with write_atomic(path) as temporary:
        made.savefig(temporary, format="png", metadata={"Software": None})


def integer_ticks(axes: Axes) -> None:
    """Whole numbers only on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def millions(params: float) -> str:
    """A parameter count for people: 15.7 M, 842 k."""
    if params >= 1e6:
        return f"{params / 1e6:.3g} M" if params < 1e9 else f"{params / 1e9:.3g} G"
    return f"{params / 1e3:.3g} k" if params >= 1e3 else f"{params:.0f}"


def duration(seconds: float) -> str:
    """A time span for people: 0.8 s, 42 s, 3 min 20 s, 25 min, 5 h 07 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 10:
        return f"{minutes} min {rest:02d} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut at the end."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
