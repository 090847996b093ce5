"""`ffnas search --resolve RUN --budget...`: a finished run answered again under other constraints, without training.

Stage 3's supernet holds trained weights of every (stack, ratio), and its trials are scored already. The constraints
given replace the run's. Recorded trials inside them are candidates; a Gaussian process that has seen all scores
proposes more, scored by shared evaluation. The best is cut out of the supernet and exported with its weights as they
are. A latency limit is kept by predictions first, then checked on the exported model; where it takes longer,
predictions are scaled and the choice is made again. A run of strategy inherit: `search.commands.resolve_inherited`.

    RUN/resolved/NAME/   architecture.json   model/   summary.json
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.file import save_architecture
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate, evaluate_dev
from engine.evaluation.metrics import primary
from engine.evaluation.shared import SharedEvaluator
from engine.export.export import export_model
from engine.files import atomic_directory, write_json_atomic
from engine.latency.build import model_milliseconds
from engine.latency.table import LatencyTable
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import build_student, extract
from engine.teacher.loading import placed
from engine.training.checkpoint import load_weights
from search.config.latency_tables import conditions, stated
from search.config.schema import SearchConfig
from search.config.space import build_space, student_fields
from search.console.progress import Reporter
from search.context import Prepared, prepare
from search.derive import Derived
from search.ledger.ledger import Trial
from search.report.card import card_facts
from search.report.tables import Candidate, read_candidates
from search.rundir import LATENCY_TABLE, RunDir
from search.samplers import GaussianSampler, SpaceExhausted
from search.space import SearchSpace
from search.space.costs import Costs, text
from search.summary import OVER

NEW, TOGETHER = 32, 8
"""New candidates scored, at most, and how many are proposed at a time."""
SECONDS = 20.0
"""No further candidates are proposed after this long."""
CORRECTIONS = 3


@dataclass
class _Scored:
    """A candidate and its score with the supernet's weights."""

    architecture: Architecture
    score: float
    recorded: bool


def resolve(folder: Path, config: SearchConfig, reporter: Reporter) -> Path:
    """Answers the finished run in `folder` under the budget of `config`; returns the folder of the answer.

    Args:
        folder: the run's directory.
        config: its configuration, with the new budget and objectives.
        reporter: shows progress.

    Raises:
        UserError: the run is not finished, nothing fits, or a latency limit cannot be met when measured.
    """
    began = time.monotonic()
    trials = require_finished(folder)
    config = _with_own_table(folder, config)
    with RunDir(folder).open(resume=True):
        return _Resolution(prepare(config, reporter), folder, trials, reporter).write(began)


def _with_own_table(folder: Path, config: SearchConfig) -> SearchConfig:
    """The run's own latency table as the one to use, where none is named and it fits the conditions."""
    own = folder / LATENCY_TABLE
    wanted = config.objectives.needs_latency(config.budget) and config.objectives.latency_table is None
    if not wanted or not own.is_file() or LatencyTable.load(own).conditions != conditions(config):
        return config
    return replace(config, objectives=replace(config.objectives, latency_table=str(own)))


def require_finished(folder: Path) -> list[Candidate]:
    """The recorded trials of stage 3; raises `UserError` unless the run in `folder` is finished."""
    rundir = RunDir(folder)
    needed = (rundir.summary, rundir.candidates(3), rundir.stage(3) / "supernet.safetensors")
    for path in needed:
        if not path.is_file():
            raise UserError(
                f"--resolve {folder}: the run has not finished ({path.name} is missing): continue it with"
                f" ffnas search --resume {folder}"
            )
    return read_candidates(rundir.candidates(3))


class _Resolution:
    """One answer in the making."""

    def __init__(self, prepared: Prepared, folder: Path, trials: list[Candidate], reporter: Reporter) -> None:
        self.prepared, self.folder, self.reporter = prepared, folder, reporter
        complete = [t for t in trials if t.state == "complete" and t.score is not None]
        self.recorded = [(Architecture.parse(t.architecture), t.score or 0.0) for t in complete]
        if not self.recorded:
            raise UserError(f"--resolve {folder}: no candidate of stage 3 completed: run the search again")
        expressions = tuple(layer.expression for layer in self.recorded[0][0].layers)
        self.space = prepared.space.with_expressions(expressions)
        self.supernet = self._supernet()
        spec = prepared.spec
        self.evaluator: SharedEvaluator | None = None
        if spec.head.pooled:
            self.evaluator = SharedEvaluator(self.supernet, prepared.data.score, precision=prepared.precision)
        self.candidates: dict[str, _Scored] = {}

    def write(self, began: float) -> Path:
        """Finds, checks and writes the answer."""
        limit, factor = self.prepared.config.budget.latency_ms, 1.0
        self._search(self.space)
        best = self._best(self.space)
        measured = None
        for _ in range(CORRECTIONS if limit is not None else 0):
            measured = self._measure(best.architecture)
            if limit is None or measured <= OVER * limit:
                break
            factor *= measured / self._cost(best.architecture, factor)
            self.reporter.info(
                f"measured {measured:.3g} ms where {limit:.3g} are allowed: predictions scaled by {factor:.2f}"
            )
            slower = self._slower(factor)
            self._search(slower)
            best = self._best(slower)
        else:
            if limit is not None:
                measured = self._measure(best.architecture)
                if measured > 1.1 * limit:
                    raise UserError(
                        f"budget.latency_ms: the exported model takes {measured:.3g} ms, more than {limit:.3g}, after"
                        f" {CORRECTIONS} corrections: measure the table again (ffnas latency --build-table)"
                    )
        return self._export(best, measured, factor, began)

    def _supernet(self) -> FFNASPreTrainedModel:
        prepared = self.prepared
        largest = max(prepared.space.stacks), max(prepared.space.ratios)
        layers = tuple(LayerSpec(layer.expression, *largest) for layer in self.recorded[0][0].layers)
        fields: dict[str, Any] = student_fields(prepared.config)
        model: FFNASPreTrainedModel = build_student(
            prepared.shape,
            Architecture(layers),
            prepared.config.student.num_heads or prepared.teacher.num_heads,
            prepared.spec,
            policy=prepared.space.policy,
            pad_token_id=prepared.teacher.tokenizer.pad_token_id,
            seed=0,
            **fields,
        )
        load_weights(RunDir(self.folder).stage(3) / "supernet.safetensors", model)
        placed(model, prepared.device)
        return model.eval()

    def _search(self, space: SearchSpace) -> None:
        """Adds recorded and newly scored candidates of `space`."""
        sampler = GaussianSampler(space, self.prepared.config.seed, startup=2)
        known = [*self.recorded, *((c.architecture, c.score) for c in self.candidates.values() if not c.recorded)]
        for architecture, score in self.recorded:
            self.candidates.setdefault(space.key(architecture), _Scored(architecture, score, True))
        sampler.observe(_trial(space, number, *pair) for number, pair in enumerate(known))
        began, done = time.monotonic(), 0
        with self.reporter.phase("resolve: candidates", NEW) as bar:
            while done < NEW and time.monotonic() - began < SECONDS:
                try:
                    proposed = sampler.propose(min(TOGETHER, NEW - done))
                except SpaceExhausted:
                    break
                pairs = list(zip(proposed, self._scores(proposed), strict=True))
                sampler.observe(_trial(space, done + n, *pair) for n, pair in enumerate(pairs))
                for architecture, score in pairs:
                    self.candidates[space.key(architecture)] = _Scored(architecture, score, False)
                done += len(pairs)
                bar.update(done, f"best {max(c.score for c in self._inside(space)):.4f}")

    def _scores(self, architectures: list[Architecture]) -> list[float]:
        prepared, spec = self.prepared, self.prepared.score_spec
        if self.evaluator is not None:
            return [primary(spec, m)[1] for m in self.evaluator.evaluate(architectures, spec)]
        data, precision = prepared.data.score, prepared.precision
        return [
            primary(spec, evaluate(self.supernet, data, spec, precision=precision, architecture=a))[1]
            for a in architectures
        ]

    def _inside(self, space: SearchSpace) -> list[_Scored]:
        return [c for c in self.candidates.values() if space.contains(c.architecture)]

    def _best(self, space: SearchSpace) -> _Scored:
        inside = self._inside(space)
        if not inside:
            raise UserError(f"--resolve {self.folder}: no candidate within the budget was found: widen it")
        return min(inside, key=lambda c: (-c.score, space.parameters(c.architecture), str(c.architecture)))

    @property
    def _costs(self) -> Costs:
        assert self.space.limits is not None  # a budget was asked for
        return self.space.limits.costs

    @property
    def _table(self) -> LatencyTable:
        assert self._costs.table is not None  # the budget is one of latency
        return self._costs.table

    def _cost(self, architecture: Architecture, factor: float) -> float:
        return factor * self._costs.cost("latency_ms", architecture)

    def _slower(self, factor: float) -> SearchSpace:
        """The space on a device that takes `factor` times as long as the table says."""
        table = self._table.scaled(factor)
        prepared = self.prepared
        return build_space(prepared.config, prepared.shape, table).with_expressions(self.space.fixed_expressions or ())

    def _measure(self, architecture: Architecture) -> float:
        at = self._table.conditions
        return model_milliseconds(extract(self.supernet, architecture), at)

    def _export(self, best: _Scored, measured: float | None, factor: float, began: float) -> Path:
        prepared, space, spec = self.prepared, self.space, self.prepared.spec
        model = extract(self.supernet, best.architecture)
        dev = evaluate_dev(model, prepared.data, precision=prepared.precision)
        budget = {k: v for k, v in vars(prepared.config.budget).items() if v is not None}
        costs = self._costs.of(best.architecture)
        name, value = primary(spec, dev)
        summary: dict[str, Any] = {
            "run": str(self.folder),
            "budget": budget,
            "architecture": str(best.architecture),
            "score": best.score,
            "recorded": best.recorded,
            "costs": costs,
            "metric": {"name": name, "value": value, "split": "dev"},
            "metrics": {"dev": dev},
            "candidates": {
                "recorded": len(self.recorded),
                "new": sum(not c.recorded for c in self.candidates.values()),
                "within the budget": len(self._inside(space)),
            },
        }
        if measured is not None:
            summary["latency"] = {
                "limit_ms": prepared.config.budget.latency_ms,
                "predicted_ms": costs["latency_ms"],
                "measured_ms": measured,
                "correction": factor,
                "conditions": str(self._table.conditions),
                "table": stated(self._table, prepared.config.budget.latency_ms),
            }
        path = RunDir(self.folder).resolved(budget)
        path.parent.mkdir(exist_ok=True)
        card = {
            **card_facts(prepared, Derived(model, best.architecture, 0, {}, dev), {}),
            "found": "by search, then chosen for other constraints with the supernet's weights, not distilled further",
        }
        with atomic_directory(path) as temporary:
            save_architecture(best.architecture, temporary / "architecture.json", prepared.shape)
            export_model(self.supernet, prepared.teacher.tokenizer, temporary / "model", best.architecture, card)
            summary["seconds"] = round(time.monotonic() - began, 2)
            write_json_atomic(temporary / "summary.json", summary)
        parts = [text(cost, amount) for cost, amount in costs.items()]
        if measured is not None:
            parts.append(f"measured {measured:.3g} ms")
        self.reporter.info(f"resolved: {name} {value:.4f} on dev, {', '.join(parts)}, {summary['seconds']:.1f} s")
        self.reporter.info(f"model: {path / 'model'}")
        return path


def _trial(space: SearchSpace, number: int, architecture: Architecture, score: float) -> Trial:
    params = space.parameters(architecture)
    return Trial("resolve", number, architecture, space.key(architecture), score, params, 0.0)
