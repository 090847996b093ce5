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
from collections.abc import Sequence

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
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
    simple, labels = task.spec.head.simple_models(), task.train.labels
    if simple is None or labels is None:
        return Answers(BAG_OF_WORDS, None, note=_why_none(task.spec))
    began = time.perf_counter()
    rows = task.train.sample(MAX_ROWS, derive_seed(seed, BAG_OF_WORDS))
    if rows.labels is None or simple.is_trivial(rows.labels):
        return Answers(BAG_OF_WORDS, None, note="the rows of train are all of one class")
    features = _Features(task.spec.is_pair)
    try:
        train = features.fit(rows.texts)
    except ValueError:  # scikit-learn's "empty vocabulary"
        return Answers(BAG_OF_WORDS, None, note="the texts of train have no words")
    select, dev = features(task.select.texts), features(task.dev.texts)
    best: tuple[float, float, np.ndarray] | None = None
    for strength in STRENGTHS:
        # fitted from nothing: started from the one before, the solver takes its small gradients for the end (CoLA: MCC
        # 11.7 instead of 17.2)
        answer = simple.fit(train, rows.labels, task.spec.num_labels, strength)
        score = primary(task.spec, compute_metrics(task.spec, answer(select), task.select.labels))[1]
        if best is None or score > best[0]:
            best = score, strength, answer(dev)
    assert best is not None
    of = "" if len(rows) == len(task.train) else f" of {len(task.train):,}"
    note = f"{train.shape[1]:,} features, {len(rows):,}{of} rows, regularisation 1/{best[1]:g}"
    return Answers(BAG_OF_WORDS, best[2], time.perf_counter() - began, note)


def majority(task: TaskData) -> Answers:
    """Always the most frequent class of `task.train`, or its mean value; without rows for other kinds of tasks."""
    simple, labels = task.spec.head.simple_models(), task.train.labels
    if simple is None or labels is None:
        return Answers(MAJORITY, None, note=_why_none(task.spec))
    began = time.perf_counter()
    answer, note = simple.constant(labels, task.spec.label_names)
    rows = np.repeat(answer[None].astype(np.float32), len(task.dev), axis=0)
    return Answers(MAJORITY, rows, time.perf_counter() - began, note)


def _why_none(spec: TaskSpec) -> str:
    if spec.head.simple_models() is None:
        return f"there is none for {spec.kind.replace('_', ' ')}"
    return "the rows of train have no labels"


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
