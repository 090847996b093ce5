"""Rows of a task before anything is tokenized: columns of Python strings beside one NumPy array of labels.

Rejected: handing `datasets.Dataset` objects around; every consumer would then depend on that library and on its cache
files staying where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

NO_LABEL = -100
"""Class of a row (or token) that has none, and so does not count in a loss; among values it is NaN."""


@dataclass(frozen=True)
class Gold:
    """Accepted answers to one question; none at all where the context does not answer it.

    Attributes:
        texts: as they stand in the context.
        starts: character at which each begins.
    """

    texts: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rows:
    """Texts and labels of one split.

    Attributes:
        texts: one list of N strings per text column.
        labels: [N] int64 class ids or float32 targets; None for unlabelled rows, and where a row's label is no number.
        ids: names of the rows in their published file, for prediction files; None where there are none.
        golds: N dataclasses, where a row's label is no number (`Gold` of question answering), otherwise None.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None = None
    ids: list[str] | None = None
    golds: list[Any] | None = None

    def __post_init__(self) -> None:
        counts = {len(column) for column in self.texts}
        counts.update(len(part) for part in (self.labels, self.ids, self.golds) if part is not None)
        if len(counts) != 1:
            raise ValueError(f"columns of unequal length: {sorted(counts)}")

    def __len__(self) -> int:
        return len(self.texts[0])

    def take(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        texts = tuple([column[i] for i in indices.tolist()] for column in self.texts)
        return Rows(
            texts,
            None if self.labels is None else self.labels[indices],
            None if self.ids is None else [self.ids[i] for i in indices.tolist()],
            None if self.golds is None else [self.golds[i] for i in indices.tolist()],
        )

    def sample(self, count: int | None, seed: int) -> Rows:
        """At most `count` rows drawn without replacement, in their original order."""
        if count is None or count >= len(self):
            return self
        return self.take(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several splits of one task, one after the other."""
    labels = [part.labels for part in parts if part.labels is not None]
    ids = [part.ids for part in parts if part.ids is not None]
    golds = [part.golds for part in parts if part.golds is not None]
    return Rows(
        tuple(
            [text for column in columns for text in column] for columns in zip(*(p.texts for p in parts), strict=True)
        ),
        np.concatenate(labels) if len(labels) == len(parts) else None,
        [name for names in ids for name in names] if len(ids) == len(parts) else None,
        [gold for answers in golds for gold in answers] if len(golds) == len(parts) else None,
    )
