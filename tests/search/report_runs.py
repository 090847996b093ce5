"""Run directories for report tests: every file of a finished run, made up but consistent."""

import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
from latency_toys import toy_table

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.file import save_architecture
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.latency.table import Check
from kernels.language.expression import GELU_FFN
from search.ledger.ledger import Trial
from search.report.tables import write_candidates
from search.rundir import LATENCY_TABLE, RunDir
from search.samplers import PartitionSampler
from search.space import SearchSpace
from search.space.costs import Costs

SECONDS = {
    "teacher": 31.2,
    "teacher evaluation": 2.1,
    "warm-up": 64.0,
    "stage1 candidates": 121.9,
    "stage2 candidates": 97.4,
    "stage3 text": 22.0,
    "stage3 task": 25.5,
    "stage3 candidates": 12.3,
    "derive text": 20.1,
    "derive task": 44.4,
    "gelu text": 20.2,
    "random candidates": 143.0,
    "export": 0.4,
}


def write_run(path, *, layers=6, hidden=540, trials=80, teacher_layers=12, seed=0, name_of_teacher="bert-base-uncased"):
    """Writes a finished run of `layers` layers with `trials` trials a stage and returns its path."""
    rng = np.random.default_rng(seed)
    shape = ModelShape(hidden, layers, hidden, teacher_hidden_size=768)
    table = toy_table(shape, heads=12, sequence_length=128)
    costs = Costs(shape, table=table)
    space = SearchSpace(shape)
    rundir = RunDir(path)
    winner = space.sample(rng)
    counts = {}
    for number, gain in ((1, 0.0), (2, 0.02), (3, -0.15)):
        part = {1: space, 2: space.with_shapes([(s.stack, s.ratio) for s in winner.layers])}.get(
            number, space.with_expressions([s.expression for s in winner.layers])
        )
        made = _trials(part, f"stage{number}", trials, 0.55 + gain, rng, costs)
        best = max((t for t in made if t.score is not None), key=lambda t: t.score)
        winner, counts[str(number)] = best.architecture, len(made)
        write_candidates(rundir.candidates(number), made)
        sampler = PartitionSampler(part, seed, startup=trials // 2)
        sampler.observe(made)
        (rundir.stage(number) / "sampler.json").write_text(json.dumps(sampler.diagnostics()))
        (rundir.stage(number) / "best.json").write_text(json.dumps({"number": best.number, "score": best.score}))
    write_candidates(
        rundir.baseline("random") / "candidates.csv", _trials(space, "random", 2 * trials, 0.54, rng, costs)
    )
    _check(table, space, rng).save(rundir.path / LATENCY_TABLE)
    save_architecture(winner, _made(rundir.architecture), shape)
    gelu = Architecture((LayerSpec(GELU_FFN, 2, Fraction(1, 2)),) * layers)
    rundir.summary.write_text(
        json.dumps(
            {
                "task": {"name": "sentiment", "kind": "classification", "rows": {"train": 9000, "dev": 2000}},
                "score": {"name": "accuracy", "split": "score"},
                "best": _model(winner, shape, 0.741),
                "baselines": {"gelu": _model(gelu, shape, 0.722), "random": _model(gelu, shape, 0.7312)},
                "teacher": {
                    "source": name_of_teacher,
                    "params": 109_482_240,
                    "layers": teacher_layers,
                    "hidden_size": 768,
                    "metric": {"name": "accuracy", "value": 0.782, "split": "dev"},
                    "metrics": {"dev": {"accuracy": 0.782, "f1": 0.771}},
                },
                "student": {"hidden_size": hidden, "layers": layers},
                "budget": {"params": list(space.budget), "latency_ms": 16.0},
                "latency": {
                    "predicted_ms": table.predict(winner),
                    "measured_ms": 1.03 * table.predict(winner),
                    "conditions": str(table.conditions),
                },
                "trials": {**counts, "random": 2 * trials, "failed": 5, "duplicates": 7},
                "seconds": SECONDS,
                "device": "cpu",
                "backend": "reference",
                "precision": "fp32",
                "seed": seed,
                "versions": {"python": "3.11.7", "ffnas": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
                "notes": ["915 duplicate texts dropped"],
            }
        )
    )
    answer = _made(rundir.path / "resolved" / "latency_ms-9" / "summary.json")
    answer.write_text(
        json.dumps(
            {
                "score": 0.42,
                "costs": costs.of(gelu),
                "metric": {"name": "accuracy", "value": 0.701, "split": "dev"},
                "latency": {"predicted_ms": table.predict(gelu), "measured_ms": 0.97 * table.predict(gelu)},
            }
        )
    )
    rundir.config.write_text("preset: demo\nseed: 0\nstudent:\n  hidden_size: 540\n")
    with rundir.log_file.open("w") as file:
        for phase in ("warm-up", "stage3 text", "stage3 task", "derive text", "derive task", "gelu text", "gelu task"):
            for step in range(10, 410, 10):
                decay = math.exp(-step / 150)
                parts = {"hidden": 0.2 + 0.8 * decay, "attention": 0.05 + 0.6 * decay, "prediction": 0.0}
                if phase.endswith("task"):
                    parts["prediction"] = 0.4 + 0.5 * decay
                noisy = {k: v * (1 + 0.03 * rng.normal()) for k, v in parts.items()}
                line = {"phase": phase, "step": step, "seconds": step / 9, "total": sum(noisy.values()), **noisy}
                file.write(json.dumps(line) + "\n")
    return path


def _trials(space, stage, total, level, rng, costs):
    made = []
    for number in range(total):
        architecture = space.sample(rng)
        params = space.parameters(architecture)
        low, high = space.budget
        score = level + 0.06 * (params - low) / max(high - low, 1) + 0.035 * rng.normal() + 0.0004 * number
        failed = number % 23 == 7
        made.append(
            Trial(
                stage,
                number,
                architecture,
                space.key(architecture),
                None if failed else float(score),
                params,
                1.4,
                "failed" if failed else "complete",
                f"the loss is not finite at step {10 * number}: {{'total': nan}}" if failed else None,
                {k: v for k, v in costs.of(architecture).items() if k != "params"},
            )
        )
    return made


def _check(table, space, rng):
    predicted = [table.predict(space.sample(rng)) for _ in range(50)]
    return replace(table, check=Check.of(predicted, [p * (1 + 0.03 * rng.normal()) for p in predicted]))


def _model(architecture, shape, value):
    return {
        "architecture": str(architecture),
        "params": count_parameters(architecture, shape),
        "params_without_fit_dense": count_parameters(architecture, shape, fit_dense=False),
        "metric": {"name": "accuracy", "value": value, "split": "dev"},
        "metrics": {"dev": {"accuracy": value, "f1": value - 0.012}, "select": {"accuracy": value + 0.01}},
    }


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
