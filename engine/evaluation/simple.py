"""Models that need no network: linear ones of sparse features, and one answer for every text (`search.evidence`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from engine.data.results import Simple

FLOOR = -30.0
"""Log-probability of a class that train does not hold."""


class SimpleClasses(Simple):
    """Logistic regression, and the shares of the classes; rows are log-probabilities [N, C]."""

    def fit(self, features: Any, labels: np.ndarray, classes: int, strength: float) -> Callable[[Any], np.ndarray]:
        """`strength` is C, the inverse of the regularisation."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=strength, max_iter=200).fit(features, labels)

        def rows(given: Any) -> np.ndarray:
            found = np.full((given.shape[0], classes), FLOOR, dtype=np.float32)
            found[:, model.classes_] = np.maximum(model.predict_log_proba(given), FLOOR)
            return found

        return rows

    def constant(self, labels: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
        """Always the most frequent class."""
        shares = np.bincount(labels, minlength=len(names)) / len(labels)
        answer = np.where(shares > 0, np.log(np.maximum(shares, 1e-300)), FLOOR)
        return answer, f"the most frequent class, {names[int(shares.argmax())]}"

    def is_trivial(self, labels: np.ndarray) -> bool:
        """Whether all rows are of one class."""
        return len(np.unique(labels)) < 2


class SimpleValues(Simple):
    """Ridge regression, and the mean; rows are values [N, 1]."""

    def fit(self, features: Any, labels: np.ndarray, classes: int, strength: float) -> Callable[[Any], np.ndarray]:
        """`strength` is 1 / alpha."""
        model = Ridge(alpha=1 / strength, solver="sparse_cg").fit(features, labels.astype(np.float64))
        return lambda given: model.predict(given)[:, None].astype(np.float32)

    def constant(self, labels: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
        """Always the mean value."""
        answer = np.array([labels.astype(np.float64).mean()])
        return answer, f"the mean value, {answer[0]:.4g}"

    def is_trivial(self, labels: np.ndarray) -> bool:
        """Never: values that are all equal are refused when they are read."""
        return False
