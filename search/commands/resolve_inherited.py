"""`ffnas search --resolve RUN --budget...` for a run of strategy inherit: another student from the same block library.

The ledger has the losses of every block variant, the cache the fine-tuned teacher; statistics for the least-squares
fits are taken again, in seconds. Which layers stay is decided by training alone (`search.inherit.candidates`), so the
run's own order counts: the found model's layers, then those of the last round, best first. Of these the first whose
best student nearly uses the budget up; where none does, the first layers. Widths and heads come from the solver.

Nothing is trained: the student has inherited weights, fitted by least squares. Terminal, card and summary say so, with
the command that distils it. A latency limit is checked on the assembled student, and predictions are scaled where it
takes longer.

Rejected: choosing among sets of layers by the divergence of undistilled students. It is known to order them wrongly.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.architecture.architecture import Architecture
from engine.architecture.file import save_architecture
from engine.architecture.flops import count_flops
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate_dev
from engine.evaluation.metrics import primary
from engine.export.export import export_model
from engine.files import atomic_directory, write_json_atomic
from engine.teacher import Teacher
from engine.teacher.finetune import finetuned
from search.config.options import parse
from search.config.schema import SearchConfig
from search.console.progress import Reporter, silent
from search.context import Prepared, prepare, teacher_cache
from search.derive import Derived
from search.evidence.answers import read_predictions
from search.inherit.candidates import Budget, best_of_layers, first_layers, nothing_fits
from search.inherit.last_round import STAGE as ROUND
from search.inherit.latency import FILE, Milliseconds, conditions, measure, recorded, student_milliseconds
from search.inherit.library import STAGE as LIBRARY
from search.inherit.library import Library, known_library
from search.inherit.limits import budget_of, slower
from search.inherit.strategy import check, choices, facts, how_inherited
from search.inherit.texts import with_text
from search.inherit.total import Tables
from search.inherit.variants import kept
from search.ledger.copy import open_ledger
from search.ledger.ledger import Trial
from search.report.card import card_facts
from search.rundir import RunDir
from search.space.costs import text
from search.summary import OVER

ENOUGH = 0.9
"""Share of some limit that a student of a ranked set of layers has to use: a smaller one leaves too much behind."""
CORRECTIONS = 3


@dataclass
class _Answer:
    """A student and why it was taken.

    Attributes:
        architecture: of as many layers as the teacher.
        reason: where its set of layers comes from.
        predicted: milliseconds, None where latency is not limited.
        measured: milliseconds of the assembled student, likewise.
        limit: milliseconds allowed, likewise.
        correction: what predictions were scaled by.
    """

    architecture: Architecture
    reason: str
    predicted: float | None = None
    measured: float | None = None
    limit: float | None = None
    correction: float = 1.0


def resolve_inherited(folder: Path, config: SearchConfig, reporter: Reporter) -> Path:
    """Answers the finished run in `folder` under the budget of `config`; returns the folder of the answer.

    Args:
        folder: the run's directory.
        config: its configuration, with the new budget.
        reporter: shows progress.

    Raises:
        UserError: the run is not finished, something of it is no longer there, or nothing keeps the budget.
    """
    began = time.monotonic()
    if config.budget.keep is not None:
        raise UserError("--resolve: budget.keep needs students that are trained: start ffnas search with it")
    summary = _summary(folder)
    with contextlib.ExitStack() as stack:
        rundir = stack.enter_context(RunDir(folder).open(resume=True))
        if not rundir.ledger.is_file():
            raise _gone(folder, "study.db, which has the block library")
        ledger = open_ledger(rundir.ledger, stack, reporter.info)
        library_trials, round_trials = ledger.trials(LIBRARY), ledger.trials(ROUND)
        # what there is to say about the data, the run has said; text is needed where students learned from it
        data = config.data if config.data.text else replace(config.data, max_text=1)
        prepared = prepare(replace(config, data=data), silent())
        check(prepared)
        teacher = _known_teacher(prepared)
        if teacher is None:
            raise _gone(folder, "its fine-tuned teacher in the cache (FFNAS_CACHE)")
        prepared.teacher = teacher
        prepared.data = with_text(prepared)
        library = known_library(prepared, choices(prepared), library_trials)
        if library is None:
            raise _gone(folder, "the block library in study.db, or was made with other --inherit options")
        return _Resolution(prepared, folder, library, reporter).write(_ranked(summary, round_trials), began)


def _summary(folder: Path) -> dict[str, Any]:
    path = RunDir(folder).summary
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except FileNotFoundError as error:
        raise UserError(
            f"--resolve {folder}: the run has not finished ({path.name} is missing): continue it with"
            f" ffnas search --resume {folder}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): resume the run") from error


def _known_teacher(prepared: Prepared) -> Teacher | None:
    """The fine-tuned teacher, None where the cache does not have it."""
    config = prepared.config
    return finetuned(
        config.teacher,
        prepared.data,
        config.finetune,
        teacher_cache(),
        prepared.device,
        precision=config.teacher_precision,
        standard=True,
    )


def _gone(folder: Path, what: str) -> UserError:
    return UserError(f"--resolve {folder}: the run no longer has {what}: start ffnas search with this budget")


def _ranked(summary: dict[str, Any], trials: Sequence[Trial]) -> list[tuple[int, ...]]:
    """Sets of layers, best first: the found model's, then by the last round, those trained to its end before others."""
    scored = [t for t in trials if t.score is not None]
    scored.sort(key=lambda t: (t.state != "complete", -(t.score or 0.0), t.number))
    found = tuple(summary.get("inherit", {}).get("layers", ()))
    return list(dict.fromkeys([found, *(kept(t.architecture) for t in scored)]))


def pick(library: Library, budget: Budget, ranked: Sequence[tuple[int, ...]]) -> tuple[Architecture, str]:
    """A student under `budget` and where its set of layers comes from.

    Args:
        library: with its losses.
        budget: what it has to keep.
        ranked: sets of layers, best first.

    Raises:
        UserError: nothing keeps the budget.
    """
    number = {spec: k for k, spec in enumerate(library.variants.specs)}
    rows, limits = np.arange(library.variants.shape.num_layers), np.asarray(budget.limits)
    for place, layers in enumerate(ranked):
        made = best_of_layers(library, budget, layers) if layers else None
        if made is None:
            continue
        sums = budget.costs[:, rows, [number[layer] for layer in made.layers]].sum(axis=1)
        if np.any(sums >= ENOUGH * limits) or made == library.variants.whole:
            return made, "the layers of the found model" if place == 0 else "layers that the last round ranked"
    by_hand = first_layers(library, budget)
    if by_hand is None:
        raise nothing_fits(budget)
    return by_hand, "the teacher's first layers, since no ranked set of layers uses this budget"


class _Resolution:
    """One answer in the making."""

    def __init__(self, prepared: Prepared, folder: Path, library: Library, reporter: Reporter) -> None:
        self.prepared, self.folder, self.library, self.reporter = prepared, folder, library, reporter
        self.tables = Tables(prepared, library.variants)

    def write(self, ranked: Sequence[tuple[int, ...]], began: float) -> Path:
        """Finds, checks and writes the answer."""
        prepared, spec = self.prepared, self.prepared.spec
        budget = {k: v for k, v in vars(prepared.config.budget).items() if v is not None}
        path = RunDir(self.folder).resolved(budget)
        answer = self._answer(ranked)
        table = self.tables.choose(answer.architecture)
        model = self.tables.student(self.library.assemble(answer.architecture), table).requires_grad_(True).eval()
        answers: list[np.ndarray] = []
        dev = evaluate_dev(model, self.tables.data(table), precision=prepared.precision, keep=answers.append)
        apart = self._apart(answers[0])
        metric, value = primary(spec, dev)
        made = Derived(model, answer.architecture, 0, {}, dev)
        told = facts(prepared, made)
        again = command(self.folder, prepared.config, path.name)
        params = self.tables.total(answer.architecture, table)
        summary: dict[str, Any] = {
            "run": str(self.folder),
            "budget": budget,
            "architecture": str(answer.architecture),
            "score": -apart,
            "distilled": False,
            "divergence": {"value": apart, "rows": len(answers[0]), "split": "dev"},
            "costs": self._costs(answer, params),
            "encoder": self.library.variants.encoder(answer.architecture),
            "metric": {"name": metric, "value": value, "split": "dev"},
            "metrics": {"dev": dev},
            "inherit": {**told, "chosen as": answer.reason},
            "distil": again,
        }
        if answer.limit is not None:
            summary["latency"] = {
                "limit_ms": answer.limit,
                "predicted_ms": answer.predicted,
                "measured_ms": answer.measured,
                "correction": answer.correction,
                "conditions": str(conditions(prepared)),
            }
        path.parent.mkdir(exist_ok=True)
        warning = "inherited weights, fitted by least squares: not distilled, expect much more after distillation"
        card = {
            **card_facts(prepared, made, how_inherited(told)),
            "weights": warning,
            "divergence from the teacher": f"{apart:.4f}, mean over {len(answers[0]):,} rows of dev",
            "commands": {"To distil it": again},
        }
        tokenizer = self.tables.tokenizer_of(table) or prepared.teacher.tokenizer
        config = model.config
        with atomic_directory(path) as temporary:
            save_architecture(config.full_architecture, temporary / "architecture.json", config.shape)
            export_model(model, tokenizer, temporary / "model", None, card)
            summary["seconds"] = round(time.monotonic() - began, 2)
            write_json_atomic(temporary / "summary.json", summary)
        self._tell(answer, summary, warning, path)
        return path

    def _answer(self, ranked: Sequence[tuple[int, ...]]) -> _Answer:
        """The student, with predictions scaled until a latency limit is met as measured."""
        prepared, made = self.prepared, self.library.variants
        limits = prepared.config.budget
        if limits.latency_ms is None and limits.speedup is None:
            return _Answer(*pick(self.library, self._budget(Milliseconds(np.zeros(0), 0.0, 0.0)), ranked))
        took = recorded(self.folder / "library" / FILE, prepared) or measure(prepared, self.library)
        budget, rest = self._budget(took), took.rest
        limit = budget.limits[budget.names.index("latency_ms")] + rest
        number = {spec: k for k, spec in enumerate(made.specs)}
        factor = 1.0
        for turn in range(CORRECTIONS + 1):
            architecture, reason = pick(self.library, slower(budget, factor, rest), ranked)
            predicted = rest + sum(float(took.variants[number[layer]]) for layer in architecture.layers)
            student = self.tables.student(self.library.assemble(architecture), self.tables.choose(architecture))
            measured = student_milliseconds(prepared, student.eval())
            if measured <= OVER * limit or turn == CORRECTIONS:
                break
            factor = max(factor, measured / predicted)
            self.reporter.info(
                f"measured {measured:.3g} ms where {limit:.3g} are allowed: predictions scaled by {factor:.2f}"
            )
        if measured > 1.1 * limit:
            raise UserError(
                f"budget.latency_ms: the student takes {measured:.3g} ms, more than {limit:.3g}, after {CORRECTIONS}"
                " corrections: try again when nothing else runs here, or raise the limit"
            )
        return _Answer(architecture, reason, factor * predicted, measured, limit, factor)

    def _budget(self, times: Milliseconds) -> Budget:
        return budget_of(self.prepared, self.library.variants, self.tables, lambda: times)

    def _apart(self, own: np.ndarray) -> float:
        """Mean KL divergence from the teacher's answers to dev, which the run has kept."""
        wanted, _ = read_predictions(self.folder, "teacher")
        return float(self.prepared.spec.head.divergence(torch.from_numpy(own), torch.from_numpy(wanted)).mean())

    def _costs(self, answer: _Answer, params: int) -> dict[str, float]:
        shape, chosen = self.library.variants.shape, self.prepared.config
        length = chosen.objectives.sequence_length or chosen.data.max_length
        costs: dict[str, float] = {"params": params, "flops": count_flops(answer.architecture, shape, length)}
        if answer.predicted is not None:
            costs["latency_ms"] = answer.predicted
        return costs

    def _tell(self, answer: _Answer, summary: dict[str, Any], warning: str, path: Path) -> None:
        metric, info = summary["metric"], self.reporter.info
        parts = [text(cost, amount) for cost, amount in summary["costs"].items()]
        if answer.measured is not None:
            parts.append(f"measured {answer.measured:.3g} ms")
        layers = ", ".join(str(layer) for layer in kept(answer.architecture))
        info(f"resolved: layers {layers} ({answer.reason}), {', '.join(parts)}, {summary['seconds']:.1f} s")
        apart = summary["divergence"]
        info(
            f"{metric['name']} {metric['value']:.4f} and mean divergence {apart['value']:.4f} from the teacher on"
            f" {apart['rows']:,} rows of dev: {warning}"
        )
        info(f"distil it: {summary['distil']}")
        info(f"model: {path / 'model'}")


def command(folder: Path, config: SearchConfig, name: str) -> str:
    """The search that distils for this budget: the run's own configuration with another name and budget.

    It finds the fine-tuned teacher in the cache.
    """
    own, _ = parse(["--resume", str(folder)])
    words = ["ffnas", "search", "--config", str(folder / "config.yaml"), "--runs", str(folder.parent)]
    words += ["--name", f"{folder.name}-{name}"]
    for part in ("budget", "objectives"):
        before, now = (dataclasses.asdict(getattr(c, part)) for c in (own, config))
        for field, value in now.items():
            if value != before[field]:
                words += [f"--{part}.{field}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)
