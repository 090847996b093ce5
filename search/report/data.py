"""What a report shows, read from a run directory: every file is checked, a missing one leaves its part empty.

    summary.json            result, baselines, teacher, evidence, counts, seconds, versions
    stageN/candidates.csv   trials; stageN/best.json: the number of the stage's winner
    baselines/random/candidates.csv   trials of the random search
    best/architecture.json  the found architecture
    log.jsonl               {"phase", "step", "total" (or "loss"), the terms of the loss, "seconds"}
    config.yaml             shown as it is
    stageN/sampler.json     how the sampler parted the space
    latency_table.json      predicted against measured latencies
    resolved/*/summary.json answers under other constraints

Nothing comes from the running process: reports are built later and elsewhere too (docs/decisions/0030).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture
from engine.architecture.file import load_architecture
from engine.errors import UserError
from engine.loss_terms import LOGGED
from engine.model_sources import hub_name
from search.console.phase_names import phase_name
from search.report.evidence import Evidence, read_evidence
from search.report.fields import field_of
from search.report.tables import Candidate, read_candidates
from search.rundir import LATENCY_TABLE
from search.scoring.failures import by_reason

if TYPE_CHECKING:
    from engine.latency.table import LatencyTable

_log = logging.getLogger("ffnas.report")


@dataclass(frozen=True)
class Metric:
    name: str
    value: float
    split: str


@dataclass(frozen=True)
class Model:
    """A finished model of summary.json: the found one, a baseline or the teacher.

    Attributes:
        name: for people.
        kind: "best", "baseline" or "teacher".
        params: parameter count, fit_dense included for students.
        deployed: without fit_dense, which only distillation needs; `params` where not given.
        metric: primary metric, None if not evaluated.
        metrics: all metrics on the reported split, by name.
        layers, hidden_size: of the teacher, None where not given.
    """

    name: str
    kind: str
    params: int
    deployed: int
    metric: Metric | None
    metrics: dict[str, float]
    layers: int | None = None
    hidden_size: int | None = None

    @property
    def score(self) -> float:
        """The value of its primary metric; NaN if not evaluated."""
        return math.nan if self.metric is None else self.metric.value


@dataclass(frozen=True)
class Stage:
    """The trials of one stage, by number, and the number of its winner."""

    key: str
    title: str
    trials: list[Candidate]
    best: int | None

    @property
    def scored(self) -> list[Candidate]:
        return [t for t in self.trials if t.score is not None and t.state == "complete"]

    @property
    def points(self) -> list[tuple[int, float]]:
        """Parameters and score of each of them."""
        return [(t.params, t.score) for t in self.trials if t.score is not None and t.state == "complete"]

    @property
    def failures(self) -> Counter[str]:
        """Reasons of failed trials, numbers in them replaced by #, with how often each occurred."""
        return by_reason(t.reason for t in self.trials if t.state == "failed")


@dataclass
class Curve:
    """Losses of one phase: value of each term at each step; a step logged again after a resumption counts once."""

    points: dict[int, dict[str, float]] = field(default_factory=dict)

    def term(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one term, in order, where it was finite."""
        pairs = [(s, p[name]) for s, p in sorted(self.points.items()) if name in p]
        return [s for s, _ in pairs], [v for _, v in pairs]


@dataclass
class RunData:
    """Everything a report shows; see the module's text."""

    path: Path
    summary: dict[str, Any]
    models: list[Model]
    stages: list[Stage]
    architecture: Architecture | None
    hidden_size: int | None
    params: int | None
    curves: dict[str, Curve]
    config: str
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)
    latency: LatencyTable | None = None
    resolved: dict[str, dict[str, Any]] = field(default_factory=dict)
    evidence: Evidence | None = None

    @property
    def title(self) -> str:
        """What was made, for people; of runs from before there were titles, and unfinished ones, the folder's name."""
        return self.summary.get("title") or self.path.resolve().name

    @property
    def best(self) -> Model | None:
        return next((m for m in self.models if m.kind == "best"), None)

    @property
    def teacher(self) -> Model | None:
        return next((m for m in self.models if m.kind == "teacher"), None)

    @property
    def baselines(self) -> list[Model]:
        return [m for m in self.models if m.kind == "baseline"]

    @property
    def score(self) -> str | None:
        """What candidates were scored by."""
        return self.summary.get("score", {}).get("name")

    @property
    def seconds(self) -> dict[str, float]:
        """Wall time per phase, in order; a sum named "total" is left out."""
        return {k: v for k, v in self.summary.get("seconds", {}).items() if k != "total"}


_BASELINES = {
    "gelu": "Hand-designed GELU",
    "uniform": "Best uniform student",
    "search": "Best solved student",
    "random": "Random search",
}
_STAGES = {
    "1": ("stage1", "stage1 candidates"),
    "2": ("stage2", "stage2 candidates"),
    "3": ("stage3", "stage3 candidates"),
    "library": ("library", "library"),
    "round": ("round", "last round"),
}
"""Folders of stages in a run directory, and their phases."""


def read_run(path: Path) -> RunData:
    """Reads a run directory.

    Raises:
        UserError: there is no run in it, or a file is damaged (named, with what is wrong).
    """
    if not path.is_dir():
        raise UserError(f"run directory {path}: does not exist: check the path")
    summary = _object(path / "summary.json") or {}
    stages = [s for s in (_stage(path / folder, n, phase) for n, (folder, phase) in _STAGES.items()) if s is not None]
    random = _stage(path / "baselines" / "random", "random", "random candidates")
    if random is not None:
        stages.append(random)
    curves = _curves(path / "log.jsonl")
    if not summary and not stages and not curves:
        raise UserError(f"run directory {path}: holds no results yet: check the path or let the run go on")
    _check_summary(path / "summary.json", summary)
    architecture, raw = None, _object(path / "best" / "architecture.json")
    if raw is not None:
        architecture = load_architecture(path / "best" / "architecture.json")
    return RunData(
        path=path,
        summary=summary,
        models=_models(path / "summary.json", summary),
        stages=stages,
        architecture=architecture,
        hidden_size=raw["hidden_size"] if raw is not None else None,
        params=raw["params"] if raw is not None else None,
        curves=curves,
        config=_text(path / "config.yaml") or "",
        samplers=_samplers(path),
        latency=_latency(path / LATENCY_TABLE),
        resolved=_resolved(path / "resolved"),
        evidence=read_evidence(path / "summary.json", summary),
    )


def _samplers(path: Path) -> dict[str, dict[str, Any]]:
    found = {key: _object(path / folder / "sampler.json") for key, (folder, _) in _STAGES.items()}
    return {key: value for key, value in found.items() if value is not None}


def _latency(path: Path) -> LatencyTable | None:
    if not path.is_file():
        return None
    from engine.latency.table import LatencyTable  # deferred: it loads torch

    return LatencyTable.load(path)


def _resolved(folder: Path) -> dict[str, dict[str, Any]]:
    """summary.json of every answer under other constraints, by folder."""
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    found = {name: _object(folder / name / "summary.json") for name in names}
    kept = {name: value for name, value in found.items() if value is not None}
    for name, value in kept.items():
        file = folder / name / "summary.json"
        field_of(file, value, "costs", dict)
        field_of(file, field_of(file, value, "metric", dict), "value", float, "metric.")
        if "latency" in value:
            for key in ("predicted_ms", "measured_ms"):
                field_of(file, field_of(file, value, "latency", dict), key, float, "latency.")
    return kept


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}): restore it or resume the run") from error


def _object(path: Path) -> dict[str, Any] | None:
    text = _text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is damaged, not JSON ({error}): restore it or resume the run") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is damaged, not a JSON object: restore it or resume the run")
    return value


def _stage(folder: Path, key: str, phase: str) -> Stage | None:
    if not (folder / "candidates.csv").is_file():
        return None
    trials = sorted(read_candidates(folder / "candidates.csv"), key=lambda t: t.number)
    record = _object(folder / "best.json") or {}
    scored = [t for t in trials if t.score is not None and t.state == "complete"]
    if "number" in record:
        best = field_of(folder / "best.json", record, "number", int)
    else:
        best = min(scored, key=lambda t: (-(t.score or 0.0), t.params, t.number)).number if scored else None
    title = phase_name(phase)
    return Stage(key, title[:1].upper() + title[1:], trials, best)


def _curves(path: Path) -> dict[str, Curve]:
    text = path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""
    whole, _, _ = text.rpartition("\n")  # a last line without its end is still being written
    curves: dict[str, Curve] = {}
    damaged: list[int] = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            entry = json.loads(line)
            phase, step = entry["phase"], entry["step"]
            losses = {t: entry.get(t) for t in LOGGED}
            losses["total"] = entry.get("total", entry.get("loss"))
            point = {t: float(v) for t, v in losses.items() if v is not None and math.isfinite(v)}
            if not isinstance(phase, str) or not isinstance(step, int):
                raise TypeError("phase must be text, step an integer")
        except (ValueError, KeyError, TypeError, AttributeError):  # curves are for the reader, results need none
            damaged.append(number)
            continue
        curves.setdefault(phase, Curve()).points[step] = point
    if damaged:
        _log.warning("%s: %d lines are damaged and left out, first line %d", path, len(damaged), damaged[0])
    return curves


def _check_summary(path: Path, summary: dict[str, Any]) -> None:
    """Shapes of the parts that are shown as they are."""
    for name in ("baselines", "trials", "seconds", "versions", "task", "score", "student", "budget"):
        if name in summary:
            field_of(path, summary, name, dict)
    if "title" in summary:
        field_of(path, summary, "title", str)
    if "score" in summary:
        field_of(path, summary["score"], "name", str, "score.")
    for name, kind in (("trials", int), ("seconds", float)):
        for key in summary.get(name, {}):
            field_of(path, summary[name], key, kind, f"{name}.")
    if "params" in summary.get("budget", {}):
        window = field_of(path, summary["budget"], "params", list, "budget.")
        if len(window) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in window):
            raise UserError(f"{path}: budget.params: must be two numbers, got {window!r:.60}")
    if "notes" in summary:
        field_of(path, summary, "notes", list)


def _models(path: Path, summary: dict[str, Any]) -> list[Model]:
    models = []
    if summary.get("best") is not None:
        models.append(_model(path, summary, "best", "Found architecture", "best"))
    baselines = summary.get("baselines", {})
    models += [
        _model(path, baselines, key, _BASELINES.get(key, key), "baseline")
        for key in baselines
        if baselines[key] is not None
    ]
    if summary.get("teacher") is not None:
        source = summary["teacher"].get("source") if isinstance(summary["teacher"], dict) else None
        models.append(
            _model(path, summary, "teacher", f"Teacher: {_short(source)}" if source else "Teacher", "teacher")
        )
    return models


def _model(path: Path, parent: Mapping[str, Any], key: str, name: str, kind: str) -> Model:
    entry = field_of(path, parent, key, dict)

    def optional(field_name: str, default: Any, field_kind: type = int) -> Any:
        if entry.get(field_name) is None:
            return default
        return field_of(path, entry, field_name, field_kind, f"{key}.")

    params = field_of(path, entry, "params", int, f"{key}.")
    metric, metrics = None, {}
    raw = optional("metric", None, dict)
    if raw is not None:
        prefix = f"{key}.metric."
        metric = Metric(
            field_of(path, raw, "name", str, prefix),
            field_of(path, raw, "value", float, prefix),
            field_of(path, raw, "split", str, prefix),
        )
        given = optional("metrics", {}, dict).get(metric.split) or {}
        metrics = {n: field_of(path, given, n, float, f"{key}.metrics.{metric.split}.") for n in given}
        metrics = {metric.name: metric.value, **metrics}
    return Model(
        name=name,
        kind=kind,
        params=params,
        deployed=optional("params_without_fit_dense", params),
        metric=metric,
        metrics=metrics,
        layers=optional("layers", None),
        hidden_size=optional("hidden_size", None),
    )


def _short(source: Any) -> str:
    """The last part of a teacher's name or folder."""
    text = (hub_name(str(source)) or str(source)).rstrip("/\\")
    return re.split(r"[/\\:]", text)[-1] or text
