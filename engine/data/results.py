"""What becomes of a model's outputs, whatever the kind of task: metrics, rows kept for comparisons, lines to write."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Found = Iterable[tuple[np.ndarray, "Tensor"]]
"""Rows of a data set, batch by batch, and the model's float32 outputs for them on the CPU."""


@dataclass(frozen=True)
class Measured:
    """How good answers are.

    Attributes:
        metrics: by name, over all rows.
        rows: gives what is kept of each row for comparing models, [N, `TaskHead.kept_columns`] float32 in the order of
            the rows; costly for some kinds, so computed when asked for.
    """

    metrics: dict[str, float]
    rows: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Predictions:
    """What `ffnas predict` writes.

    Attributes:
        records: a mapping per row, for CSV, TSV and JSON Lines; None where there is a document.
        document: one JSON value in their place.
        beside: further JSON files beside a document, by the end of their names.
    """

    records: list[dict[str, Any]] | None = None
    document: Any = None
    beside: Mapping[str, Any] = field(default_factory=dict)


class Simple(ABC):
    """Models of one kind of task that need no network: of sparse features, and one that looks at no text."""

    @abstractmethod
    def fit(self, features: Any, labels: np.ndarray, classes: int, strength: float) -> Callable[[Any], np.ndarray]:
        """A linear model of sparse features [N, F]; gives rows [M, K] float32 for other features [M, F]."""

    @abstractmethod
    def constant(self, labels: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
        """[K] the best answer that looks at no text, and what it is in words."""

    @abstractmethod
    def is_trivial(self, labels: np.ndarray) -> bool:
        """Whether one answer is right for all training rows, so that a linear model has nothing to learn."""
