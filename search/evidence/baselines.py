"""The two models nobody needs a search for: a bag of words, and always the same answer.

A found model that is not better than these is not worth shipping. Both train on the train split in seconds; the
strength of regularisation is chosen on the select split, as checkpoints are, and dev is answered once.

Features: TF-IDF of words and word pairs with sublinear counts. Of two texts: both texts' features, and how far they
agree: the product of their unit-length unigram vectors, word by word and in sum.

Rejected: embeddings of a pretrained model with a linear head. It would be a stronger baseline and no bag of words; the
teacher is in the comparison already.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import normalize

from engine.data import TaskData, TaskSpec
from engine.evaluation.metrics import compute_metrics, primary
from engine.seeding import derive_seed
from search.evidence.answers import Answers

BAG_OF_WORDS, MAJORITY = "bag_of_words", "majority"
MAX_FEATURES = 200_000
MAX_ROWS = 100_000
"""Rows it is trained on at most, a sample of more: it gains little beyond and should stay a matter of seconds."""
STRENGTHS = (0.5, 2.0, 8.0, 32.0)
"""C of the logistic regression, 1 / alpha of ridge: weakest first; of equals on select the first is taken."""
FLOOR = -30.0
"""Log-probability of a class that train does not hold."""
_TOKENS = r"(?u)\b\w+\b"


def bag_of_words(task: TaskData, seed: int = 0) -> Answers:
    """TF-IDF with logistic regression, or ridge regression, trained on `task.train`; its answers to `task.dev`.

    Args:
        task: rows of classification or regression.
        seed: of the sample, where there are more than `MAX_ROWS` rows.

    Returns:
        log-probabilities [N, C], or values [N, 1]; without rows, and with a reason as `note`, for tasks of other
        kinds, texts without words and rows all of one class.
    """
    reason = _why_none(task.spec)
    labels = task.train.labels
    if reason or labels is None:
        return Answers(BAG_OF_WORDS, None, note=reason or "the rows of train have no labels")
    began = time.perf_counter()
    rows = task.train.sample(MAX_ROWS, derive_seed(seed, BAG_OF_WORDS))
    if rows.labels is None or (not task.spec.is_regression and len(np.unique(rows.labels)) < 2):
        return Answers(BAG_OF_WORDS, None, note="the rows of train are all of one class")
    features = _Features(task.spec.is_pair)
    try:
        train = features.fit(rows.texts)
    except ValueError:  # scikit-learn's "empty vocabulary"
        return Answers(BAG_OF_WORDS, None, note="the texts of train have no words")
    select, dev = features(task.select.texts), features(task.dev.texts)
    best: tuple[float, float, np.ndarray] | None = None
    for strength, model in _models(task.spec, train, rows.labels):
        score = primary(task.spec, compute_metrics(task.spec, _rows(task.spec, model, select), task.select.labels))[1]
        if best is None or score > best[0]:
            best = score, strength, _rows(task.spec, model, dev)
    assert best is not None
    of = "" if len(rows) == len(task.train) else f" of {len(task.train):,}"
    note = f"{train.shape[1]:,} features, {len(rows):,}{of} rows, regularisation 1/{best[1]:g}"
    return Answers(BAG_OF_WORDS, best[2], time.perf_counter() - began, note)


def majority(task: TaskData) -> Answers:
    """Always the most frequent class of `task.train`, or its mean value; without rows for other kinds of tasks."""
    reason = _why_none(task.spec)
    labels = task.train.labels
    if reason or labels is None:
        return Answers(MAJORITY, None, note=reason or "the rows of train have no labels")
    began = time.perf_counter()
    if task.spec.is_regression:
        answer = np.array([labels.astype(np.float64).mean()])
        note = f"the mean value, {answer[0]:.4g}"
    else:
        shares = np.bincount(labels, minlength=task.spec.num_labels) / len(labels)
        answer = np.where(shares > 0, np.log(np.maximum(shares, 1e-300)), FLOOR)
        note = f"the most frequent class, {task.spec.label_names[int(shares.argmax())]}"
    rows = np.repeat(answer[None].astype(np.float32), len(task.dev), axis=0)
    return Answers(MAJORITY, rows, time.perf_counter() - began, note)


def _why_none(spec: TaskSpec) -> str:
    return f"there is none for {spec.kind.replace('_', ' ')}" if spec.is_span or spec.is_choice else ""


class _Features:
    """Texts as sparse rows [N, F]; `fit` learns words and their weights.

    Args:
        pair: whether a row is two texts.
    """

    def __init__(self, pair: bool) -> None:
        self.pair = pair
        most = MAX_FEATURES * 2 // 5 if pair else MAX_FEATURES
        self.words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=most, token_pattern=_TOKENS)
        self.unigrams = TfidfVectorizer(
            sublinear_tf=True, max_features=MAX_FEATURES - 2 * most - 1 if pair else 1, token_pattern=_TOKENS
        )

    def fit(self, texts: Sequence[list[str]]) -> sparse.csr_matrix:
        """Learns from the rows of train and returns their features."""
        together = [text for column in texts for text in column]
        self.words.fit(together)
        if self.pair:
            self.unigrams.fit(together)
        return self(texts)

    def __call__(self, texts: Sequence[list[str]]) -> sparse.csr_matrix:
        parts = [self.words.transform(column) for column in texts]
        if self.pair:
            first, second = (normalize(self.unigrams.transform(column)) for column in texts)
            shared = first.multiply(second)
            parts += [shared, sparse.csr_matrix(shared.sum(axis=1))]
        return parts[0] if len(parts) == 1 else sparse.hstack(parts, format="csr")


def _models(spec: TaskSpec, features: sparse.csr_matrix, labels: np.ndarray) -> Iterator[tuple[float, object]]:
    """A fitted model per strength, each as it is asked for and from nothing: started from the one before, the solver
    takes its small gradients for the end (CoLA: MCC 11.7 instead of 17.2)."""
    for strength in STRENGTHS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            if spec.is_regression:
                model = Ridge(alpha=1 / strength, solver="sparse_cg").fit(features, labels.astype(np.float64))
            else:
                model = LogisticRegression(C=strength, max_iter=200).fit(features, labels)
        yield strength, model


def _rows(spec: TaskSpec, model: object, features: sparse.csr_matrix) -> np.ndarray:
    """[N, C] float32 log-probabilities of all classes of the task, or [N, 1] values."""
    if isinstance(model, Ridge):
        return model.predict(features)[:, None].astype(np.float32)
    assert isinstance(model, LogisticRegression)
    rows = np.full((features.shape[0], spec.num_labels), FLOOR, dtype=np.float32)
    rows[:, model.classes_] = np.maximum(model.predict_log_proba(features), FLOOR)
    return rows
