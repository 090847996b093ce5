"""Small tasks and answers for the tests of evidence."""

import numpy as np

from engine.data import Rows, TaskData, TaskSpec

SPEC = TaskSpec("toy", "classification", ("text",), "label", ("bad", "good"))
FILLER = [f"word{i}" for i in range(60)]
TELLING = {0: ["awful", "dull", "broken"], 1: ["great", "lovely", "superb"], 2: ["plain", "usual", "so-so"]}


def rows(count, seed, classes=2, clarity=0.8):
    """Texts of which the share `clarity` holds a word that tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    texts = []
    for label in labels:
        shown = label if rng.random() < clarity else rng.integers(0, classes)
        words = [*rng.choice(FILLER, rng.integers(1, 9)), rng.choice(TELLING[int(shown)])]
        rng.shuffle(words)
        texts.append(" ".join(words))
    return Rows((texts,), labels.astype(np.int64))


def task(classes=2, counts=(160, 40, 50, 70), seed=0):
    spec = TaskSpec("toy", "classification", ("text",), "label", ("bad", "good", "fair")[:classes])
    return TaskData(spec, *(rows(n, seed + i, classes) for i, n in enumerate(counts)), text=[])


def pairs(count, seed, number=True):
    """Pairs of texts; the label is the share of words they have in common, or whether it is a half or more."""
    rng = np.random.default_rng(seed)
    first, second, labels = [], [], []
    for _ in range(count):
        words = list(rng.choice(FILLER, 6, replace=False))
        same = int(rng.integers(0, 7))
        others = list(rng.choice([w for w in FILLER if w not in words], 6 - same, replace=False))
        first.append(" ".join(words))
        second.append(" ".join(rng.permutation(words[:same] + others)))
        labels.append(same / 6 + rng.normal(0, 0.03) if number else int(same >= 3))
    return Rows((first, second), np.array(labels, dtype=np.float32 if number else np.int64))


def logits(labels, right, classes, seed):
    """[N, C] float32 answers of which about the share `right` is right."""
    rng = np.random.default_rng(seed)
    made = rng.normal(size=(len(labels), classes)).astype(np.float32)
    hit = rng.random(len(labels)) < right
    made[np.arange(len(labels))[hit], labels[hit]] += 6
    return made
