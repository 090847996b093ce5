"""The report's first section: is the found model worth shipping? Read from summary.json, as table and as plot.

Runs from before there was evidence have none of it. Rejected: reading predictions/ and comparing again; a report
should say what the run said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.report.answers import Answers, read_answers
from search.report.fields import field_of
from search.report.theme import BASELINE, BEST, FAINT, INK, MUTED, TEACHER, WIDTH, figure, millions, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {"found": BEST, "teacher": TEACHER}
_MARKERS = {"found": "*", "teacher": "P"}


@dataclass(frozen=True)
class Range:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """A model of the evidence.

    Attributes:
        title: for people.
        kind: "found", "baseline", "teacher", "words" or "constant".
        score: primary metric on dev.
        gap: found minus this model; None of the found one.
        words: what that means, "" of the found one.
        encoder, total: parameters, None where not known.
        size: bytes on disk, None where not known.
        speed: (batch, side, milliseconds).
        note: how it was made.
    """

    title: str
    kind: str
    score: Range
    gap: Range | None
    words: str
    encoder: int | None
    total: int | None
    size: int | None
    speed: tuple[tuple[int, str, float], ...]
    note: str

    def milliseconds(self, batch: int) -> str:
        """Of a pass of `batch` sequences: on the kernels where measured, and in eager PyTorch."""
        took = {side: ms for size, side, ms in self.speed if size == batch}
        eager, kernels = took.get("eager"), took.get("kernels")
        if eager is None or kernels is None:
            return "–" if eager is None and kernels is None else f"{eager or kernels:.3g}"
        return f"{kernels:.3g} (eager {eager:.3g})"


@dataclass(frozen=True)
class Evidence:
    """What summary.json holds under "evidence"."""

    verdict: str
    advice: list[str]
    metric: str
    split: str
    rows: int
    confidence: float
    models: list[Compared]
    missing: list[str]
    conditions: str
    answers: Answers | None = None

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were timed."""
        return sorted({batch for model in self.models for batch, _, _ in model.speed})

    @property
    def table(self) -> list[dict[str, Any]]:
        """Cells of each model."""
        return [
            {
                "title": model.title,
                "kind": model.kind,
                "note": model.note,
                "score": f"{model.score.value:.4f} ({model.score.low:.4f} to {model.score.high:.4f})",
                "gap": "–" if model.gap is None else _signed(model.gap),
                "words": model.words,
                "encoder": "–" if model.encoder is None else f"{model.encoder:,}",
                "total": "–" if model.total is None else f"{model.total:,}",
                "size": "–" if model.size is None else _size(model.size),
                "speed": [model.milliseconds(batch) for batch in self.batches],
            }
            for model in self.models
        ]


def read_evidence(path: Path, summary: Mapping[str, Any]) -> Evidence | None:
    """The evidence of a summary, None where it has none; `path` is what errors name.

    Raises:
        UserError: a part is missing or damaged.
    """
    if summary.get("evidence") is None:
        return None
    raw, prefix = field_of(path, summary, "evidence", dict), "evidence."
    models = field_of(path, raw, "models", list, prefix)
    missing = [
        ": ".join(field_of(path, entry, part, str, "evidence.missing.") for part in ("name", "reason"))
        for entry in raw.get("missing") or []
    ]
    return Evidence(
        verdict=field_of(path, raw, "verdict", str, prefix),
        advice=[str(line) for line in field_of(path, raw, "advice", list, prefix)],
        metric=field_of(path, raw, "metric", str, prefix),
        split=field_of(path, raw, "split", str, prefix),
        rows=field_of(path, raw, "rows", int, prefix),
        confidence=field_of(path, raw, "confidence", float, prefix),
        models=[_compared(path, model, f"evidence.models.{number}.") for number, model in enumerate(models)],
        missing=missing,
        conditions=_conditions(path, raw),
        answers=read_answers(path, raw),
    )


def _compared(path: Path, raw: Any, prefix: str) -> Compared:
    title = field_of(path, raw, "title", str, prefix)
    params = raw.get("params") or {}
    gap = raw.get("difference")
    return Compared(
        title=title,
        kind=field_of(path, raw, "kind", str, prefix),
        score=_range(path, field_of(path, raw, "metric", dict, prefix), f"{prefix}metric."),
        gap=None if gap is None else _range(path, gap, f"{prefix}difference."),
        words="" if gap is None else field_of(path, gap, "words", str, f"{prefix}difference."),
        encoder=field_of(path, params, "encoder", int, f"{prefix}params.") if params else None,
        total=field_of(path, params, "total", int, f"{prefix}params.") if params else None,
        size=None if raw.get("bytes") is None else field_of(path, raw, "bytes", int, prefix),
        speed=tuple(_timing(path, entry, f"{prefix}speed.") for entry in raw.get("speed") or []),
        note=str(raw.get("note") or ""),
    )


def _timing(path: Path, raw: Any, prefix: str) -> tuple[int, str, float]:
    return (
        field_of(path, raw, "batch", int, prefix),
        field_of(path, raw, "side", str, prefix),
        field_of(path, raw, "milliseconds", float, prefix),
    )


def _range(path: Path, raw: Any, prefix: str) -> Range:
    return Range(*(field_of(path, raw, name, float, prefix) for name in ("value", "low", "high")))


def _conditions(path: Path, raw: Mapping[str, Any]) -> str:
    """How speed was measured, "" where it was not."""
    if raw.get("speed") is None:
        return ""
    speed = field_of(path, raw, "speed", dict, "evidence.")
    lengths = {entry.get("length") for model in raw["models"] for entry in model.get("speed") or []}
    tokens = ", ".join(str(length) for length in sorted(lengths, key=str))
    device, threads = speed.get("processor") or speed.get("device", "unknown"), speed.get("threads", "unknown")
    together = f"{threads} thread{'' if threads == 1 else 's'}"
    return f"{device}, {together}, {speed.get('precision', 'fp32')}, sequences of {tokens} tokens"


def _signed(span: Range) -> str:
    return f"{span.value:+.4f} ({span.low:+.4f} to {span.high:+.4f})"


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB"


def intervals(evidence: Evidence | None) -> Figure | None:
    """Left: every model's score; right: found minus each other model, beside 0. Lines are the intervals."""
    if evidence is None or not evidence.models:
        return None
    models = evidence.models
    others = [m for m in models if m.gap is not None]
    made = figure(WIDTH, 1.15 + 0.36 * len(models))
    panels = made.subplots(1, 2 if others else 1, squeeze=False, sharey=True)[0]
    _scores(panels[0], evidence)
    if others:
        _gaps(panels[1], evidence)
    panels[0].set_yticks(range(len(models)), [_label(m) for m in models])
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(axis="y", visible=False)
        panel.tick_params(axis="y", length=0, labelcolor=INK)
        panel.spines["left"].set_visible(False)
        panel.margins(x=0.12)
        panel.set_ylim(len(models) - 0.4, -0.6)
    return made


def _label(model: Compared) -> str:
    size = f", {millions(model.total)}" if model.total is not None else ""
    return f"{shorten(model.title, 34)}{size}"


def _scores(panel: Axes, evidence: Evidence) -> None:
    for place, model in enumerate(evidence.models):
        if model.kind == "found":
            panel.axvspan(model.score.low, model.score.high, color=BEST, alpha=0.10, lw=0)
        _interval(panel, place, model.score, model.kind)
    panel.set_title("Score")
    panel.set_xlabel(f"{evidence.metric} on {evidence.split}")


def _gaps(panel: Axes, evidence: Evidence) -> None:
    panel.axvline(0, color=MUTED, lw=1, ls=(0, (4, 3)))
    for place, model in enumerate(evidence.models):
        if model.gap is None:
            continue
        _interval(panel, place, model.gap, model.kind)
        panel.annotate(
            model.words.partition(" ")[0],
            (model.gap.value, place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=MUTED,
        )
    panel.set_title("Found minus it")
    panel.set_xlabel(f"difference of {evidence.metric}")


def _interval(panel: Axes, place: int, span: Range, kind: str) -> None:
    color = _COLORS.get(kind, BASELINE)
    panel.plot([span.low, span.high], [place, place], color=color, lw=2.2, solid_capstyle="round", zorder=3)
    size = 190 if kind == "found" else 60
    panel.scatter(
        [span.value], [place], s=size, marker=_MARKERS.get(kind, "D"), color=color, edgecolors=FAINT, lw=0.7, zorder=4
    )
