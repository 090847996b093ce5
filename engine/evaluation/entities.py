"""How good tags are: entities found, micro-averaged, and words tagged right.

What is counted of a sentence is a row [2 + 3 T] for T types: words tagged right, words, and of every type the entities
that are in both (type and both ends), those answered, and those there are. Where tags name no entities (parts of
speech), types are tags and what is counted are words. Metrics are those of the rows' sum, so that weighted sums of rows
give metrics of resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.data.tags import Entity, are_entities, entities_of


def types_of(names: Sequence[str]) -> tuple[str, ...]:
    """The types that tags name: those of entities, or the tags themselves."""
    if not are_entities(names):
        return tuple(names)
    return tuple(dict.fromkeys(name[2:] for name in names if len(name) > 1))


def counts_of(
    answer: Sequence[str], gold: Sequence[str], types: Sequence[str], *, entities: bool, strict: bool = False
) -> np.ndarray:
    """[2 + 3 T] int64 of one sentence; see the module, and `engine.data.tags` for `strict`."""
    place = {kind: 2 + 3 * index for index, kind in enumerate(types)}
    row = np.zeros(2 + 3 * len(types), dtype=np.int64)
    row[0] = sum(a == g for a, g in zip(answer, gold, strict=True))
    row[1] = len(gold)
    own, true = (_units(tags, entities, strict) for tags in (answer, gold))
    for column, units in enumerate((own & true, own, true)):
        for kind, _, _ in units:
            row[place[kind] + column] += 1
    return row


def metrics_of(counts: np.ndarray) -> dict[str, np.ndarray]:
    """`f1`, `precision`, `recall` over all types and `accuracy`, [...] of counts [..., 2 + 3 T]; 0 where nothing is
    counted."""
    counts = np.asarray(counts, dtype=np.float64)
    scores = _scores(counts[..., 2:].reshape(*counts.shape[:-1], -1, 3).sum(axis=-2))
    return {**scores, "accuracy": _share(counts[..., 0], counts[..., 1])}


def table_of(counts: np.ndarray, types: Sequence[str]) -> list[dict[str, Any]]:
    """Label, precision, recall, f1 and support of every type, from counts [2 + 3 T]."""
    each = np.asarray(counts, dtype=np.float64)[2:].reshape(-1, 3)
    scores = _scores(each)
    return [
        {"label": kind, **{name: float(value[k]) for name, value in scores.items()}, "support": int(each[k, 2])}
        for k, kind in enumerate(types)
    ]


def _units(tags: Sequence[str], entities: bool, strict: bool) -> set[Entity]:
    return set(entities_of(tags, strict=strict) if entities else [(tag, k, k + 1) for k, tag in enumerate(tags)])


def _scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Of [..., 3] found, answered and there."""
    found, answered, there = np.moveaxis(counts, -1, 0)
    return {
        "precision": _share(found, answered),
        "recall": _share(found, there),
        "f1": _share(2 * found, answered + there),
    }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
