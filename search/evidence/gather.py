"""All evidence about a found model, as summary.json holds it under "evidence".

split, rows, metric, confidence, seed, resamples
models    [{name, title, kind, metric: {name, value, low, high}, difference: {value, low, high, words} or null,
          params: {encoder, total} or null, bytes, speed: [{side, batch, length, milliseconds}], seconds, note}]
missing   [{name, reason}]: baselines there are none of
speed     {processor, threads, device, precision}: how it was measured
answers   of the found model, see `engine.evaluation.shown`
verdict   the sentence          advice   [lines]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.data import EncodedTask, TaskData
from search.console.environment import processor
from search.context import Context
from search.evidence.answers import Answers, write_predictions
from search.evidence.baselines import BAG_OF_WORDS, MAJORITY, bag_of_words, majority
from search.evidence.compare import CONFIDENCE, Comparison, Difference
from search.evidence.resample import default_resamples
from search.evidence.speed import LENGTH, SECONDS, Timing, bytes_on_disk, measure_speed, parameters
from search.evidence.verdict import advice, sentence, title

SHARE_OF_RUN = 0.05
"""Of a run's time that measuring speed may take, so that a search of a minute does not wait for it."""
LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Subject:
    """A finished model.

    Attributes:
        name: of its predictions file.
        title: what sentences call it.
        kind: "found", "baseline" or "teacher".
        rows: its answers to dev, as `engine.evaluation.evaluation.evaluate_dev` keeps them.
        model: for sizes and speed, on its device; None where those are not known.
        folder: its model directory, for the size on disk.
    """

    name: str
    title: str
    kind: str
    rows: np.ndarray
    model: nn.Module | None = None
    folder: Path | None = None


def gather_run(ctx: Context, subjects: Sequence[Subject]) -> dict[str, Any]:
    """`gather` for a run: texts, seed, length and time from `ctx`; adds its wall time to the run's phases."""
    spent = SHARE_OF_RUN * sum(ctx.seconds.values())
    with ctx.timed("evidence"):
        evidence = gather(
            ctx.rundir.path,
            ctx.task,
            ctx.data,
            subjects,
            seed=ctx.seed("evidence") % 2**32,
            length=min(ctx.config.data.max_length, LENGTH),
            seconds=min(SECONDS, max(LEAST_SECONDS, spent)),
            samples=ctx.config.report.samples,
        )
    ctx.reporter.info(evidence["verdict"])
    for line in evidence["advice"]:
        ctx.reporter.info(f"advice: {line}")
    return evidence


def gather(
    run_dir: Path,
    task: TaskData,
    data: EncodedTask,
    subjects: Sequence[Subject],
    *,
    seed: int = 0,
    length: int = LENGTH,
    seconds: float = SECONDS,
    samples: bool = True,
) -> dict[str, Any]:
    """Compares the found model with every other one, with a bag of words and with a constant answer.

    Writes predictions/NAME.npz of each into `run_dir`.

    Args:
        run_dir: the run directory.
        task: the texts.
        data: the same, encoded; its dev labels are the gold ones.
        subjects: finished models, the one of kind "found" among them, in the order they are told.
        seed: of resamples and samples.
        length: tokens of the sequences speed is measured on.
        seconds: about how long measuring speed may take; 0 leaves it out.
        samples: whether texts of dev may be part of it.

    Returns:
        see the module.
    """
    labels = None if task.spec.head.label_dtype is None else data.dev.labels
    found = next(s for s in subjects if s.kind == "found")
    others = [s for s in subjects if s is not found]
    words, constant = bag_of_words(task, seed), majority(task)
    simple = [a for a in (words, constant) if a.rows is not None]
    answers = {s.name: Answers(s.name, s.rows) for s in subjects}
    for one in (*answers.values(), *simple):
        write_predictions(run_dir, one.name, _given(one), labels, task.spec)
    comparison = Comparison(labels, task.spec, seed=seed)
    timings = _speed(subjects, data, length, seconds)
    told = [
        *(a for a in simple if a is words),
        *(answers[s.name] for s in others),
        *(a for a in simple if a is constant),
    ]
    differences = {other.name: comparison.difference(answers[found.name], other) for other in told}
    models = [
        *(_entry(answers[s.name], s, comparison, differences.get(s.name), timings) for s in (found, *others)),
        *(_entry(a, None, comparison, differences[a.name], ()) for a in simple),
    ]
    return {
        "split": "dev",
        "rows": len(found.rows),
        "metric": task.spec.metric,
        "confidence": CONFIDENCE,
        "resamples": default_resamples(len(found.rows)),
        "seed": seed,
        "models": models,
        "missing": [{"name": a.name, "reason": a.note} for a in (words, constant) if a.rows is None],
        "speed": _conditions(found) if timings else None,
        "answers": task.spec.head.shown(task.spec, found.rows, task.dev, samples=samples, seed=seed),
        **_in_words(comparison, answers, subjects, list(differences.values()), words),
    }


def _in_words(
    comparison: Comparison,
    answers: dict[str, Answers],
    subjects: Sequence[Subject],
    differences: Sequence[Difference],
    words: Answers,
) -> dict[str, Any]:
    """The verdict and the advice; `words` are the bag of words' answers."""
    found = next(answers[s.name] for s in subjects if s.kind == "found")
    teacher = next((answers[s.name] for s in subjects if s.kind == "teacher"), None)
    over_words = comparison.difference(teacher, words) if teacher is not None and words.rows is not None else None
    titles, rows = {s.name: s.title for s in subjects}, len(_given(found))
    return {
        "verdict": sentence(comparison.spec.metric, comparison.score(found), differences, rows, titles=titles),
        "advice": advice(differences, rows, teacher_over_words=over_words, titles=titles),
    }


def _given(answers: Answers) -> np.ndarray:
    if answers.rows is None:
        raise ValueError(f"{answers.name}: has no answers ({answers.note})")
    return answers.rows


def _entry(
    answers: Answers,
    subject: Subject | None,
    comparison: Comparison,
    difference: Difference | None,
    timings: Sequence[Timing],
) -> dict[str, Any]:
    """One model of the evidence; `subject` is None for the baselines without a network."""
    score = comparison.score(answers)
    model = subject.model if subject is not None else None
    gap = None
    if difference is not None:
        gap = {"value": difference.value, "low": difference.low, "high": difference.high, "words": difference.words}
    return {
        "name": answers.name,
        "title": subject.title if subject is not None else title(answers.name),
        "kind": subject.kind if subject is not None else _KINDS[answers.name],
        "metric": {"name": comparison.spec.metric, "value": score.value, "low": score.low, "high": score.high},
        "difference": gap,
        "params": None if model is None else parameters(model),
        "bytes": bytes_on_disk(subject.folder) if subject is not None else None,
        "speed": [t.to_dict() for t in timings if t.model == answers.name],
        "seconds": answers.seconds,
        "note": answers.note,
    }


_KINDS = {BAG_OF_WORDS: "words", MAJORITY: "constant"}


def _speed(subjects: Sequence[Subject], data: EncodedTask, length: int, seconds: float) -> list[Timing]:
    models = {s.name: s.model for s in subjects if s.model is not None}
    if seconds <= 0 or not models:
        return []
    return measure_speed(models, length=length, choices=data.dev.choices, seconds=seconds)


def _conditions(found: Subject) -> dict[str, Any]:
    device = "cpu" if found.model is None else str(next(found.model.parameters()).device)
    name = processor() if device == "cpu" else torch.cuda.get_device_name(device)
    return {"processor": name, "threads": torch.get_num_threads(), "device": device, "precision": "fp32"}
