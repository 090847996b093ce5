"""How good tags are: entities found, micro-averaged, and words tagged right.

Counts of a sentence are a row [5]: entities that are in both (type and both ends), entities answered, entities there
are, words tagged right, words. Metrics are of the rows' sum, so that weighted sums of rows give metrics of resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.tags import are_entities, entities_of

COLUMNS = ("found", "answered", "gold", "right", "words")


def counts_of(answer: Sequence[str], gold: Sequence[str], *, entities: bool, strict: bool = False) -> list[int]:
    """The row of a sentence; without `entities` the first three are 0."""
    found = answered = wanted = 0
    if entities:
        own, true = set(entities_of(answer, strict=strict)), set(entities_of(gold, strict=strict))
        found, answered, wanted = len(own & true), len(own), len(true)
    return [found, answered, wanted, sum(a == g for a, g in zip(answer, gold, strict=True)), len(gold)]


def metrics_of(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`f1`, `precision`, `recall`, `accuracy` [...] of counts [..., 5]; 0 where there is nothing to count."""
    found, answered, gold, right, words = np.moveaxis(np.asarray(counts, dtype=np.float64), -1, 0)
    return {
        "f1": _share(2 * found, answered + gold),
        "precision": _share(found, answered),
        "recall": _share(found, gold),
        "accuracy": _share(right, words),
    }


def table_of(answers: Sequence[Sequence[str]], golds: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Per type, or per tag where tags are no entities: label, precision, recall, f1 and how many there are."""
    found, answered, wanted = Counter[str](), Counter[str](), Counter[str]()
    spells = are_entities(tag for tags in golds for tag in tags)
    for answer, gold in zip(answers, golds, strict=True):
        own, true = (set(entities_of(t)) if spells else {(g, k, 0) for k, g in enumerate(t)} for t in (answer, gold))
        answered.update(entity[0] for entity in own)
        wanted.update(entity[0] for entity in true)
        found.update(entity[0] for entity in own & true)
    rows = []
    for label in sorted({*answered, *wanted}):
        metrics = metrics_of(np.array([found[label], answered[label], wanted[label], 0, 0]))
        scores = {name: float(metrics[name]) for name in ("precision", "recall", "f1")}
        rows.append({"label": label, **scores, "support": wanted[label]})
    return rows


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
