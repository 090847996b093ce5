"""Answers from windows against brute force, and official scores against an implementation of their own."""

import collections
import itertools
import random
import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from published_toys import write_squad, write_teacher

from engine.data import DataConfig, encode_task, load_task
from engine.data.catalog import TASKS
from engine.data.published_files import read_split
from engine.data.rows import Gold
from engine.evaluation.answers import (
    Answer,
    AnswerCollector,
    answer_metrics,
    best_spans,
    best_threshold,
    text_metrics,
)
from engine.evaluation.evaluation import answers_of, evaluate
from engine.teacher import Teacher

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "squad" / "train-v2.0-part.json"


def bare(text):
    """What the official scripts compare: words without case, punctuation and articles."""
    kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in string.punctuation)
    return [w for w in re.sub(r"\b(a|an|the)\b", " ", kept).split() if w]


def reference(texts, golds, v2):
    """Exact match and F1, written from the definition: best over accepted answers, bags of words."""
    exact = f1 = 0.0
    for text, gold in zip(texts, golds, strict=True):
        accepted = [g for g in gold.texts if bare(g) or not v2] or [""]
        exact += max(bare(text) == bare(g) for g in accepted)
        best = 0.0
        for g in accepted:
            a, b = collections.Counter(bare(text)), collections.Counter(bare(g))
            if not a or not b:
                best = max(best, float(a == b))
                continue
            same = sum(min(a[w], b[w]) for w in a)
            best = max(best, 2 * same / (sum(a.values()) + sum(b.values())))
        f1 += best
    return exact / len(texts), f1 / len(texts)


PHRASES = [
    "the cat",
    "A cat!",
    "cat",
    "red house",
    "the red, red house",
    "in Rome",
    "",
    "The",
    "42",
    "Ünïcode, ça",
    "cat house",
]


@pytest.mark.parametrize("v2", [False, True], ids=["v1.1", "v2.0"])
def test_scores_equal_an_independent_implementation(v2):
    rng = random.Random(0)
    texts = [rng.choice(PHRASES) for _ in range(300)]
    lowest = 0 if v2 else 1
    golds = [Gold(tuple(rng.choices(PHRASES, k=rng.randint(lowest, 3))), ()) for _ in texts]
    golds = [Gold(tuple(t for t in g.texts if t) or (() if v2 else ("cat",)), ()) for g in golds]
    metrics = text_metrics(texts, golds, no_answer=v2)
    exact, f1 = reference(texts, golds, v2)
    # torchmetrics adds up single scores in float32
    assert metrics["exact_match"] == pytest.approx(exact, abs=1e-6)
    assert metrics["f1"] == pytest.approx(f1, abs=1e-6)
    if v2:
        answered = [i for i, g in enumerate(golds) if any(bare(t) for t in g.texts)]
        part = reference([texts[i] for i in answered], [golds[i] for i in answered], True)
        assert metrics["answered_f1"] == pytest.approx(part[1], abs=1e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 31])
def test_best_spans_are_those_of_brute_force(length):
    torch.manual_seed(length)
    logits = torch.randn(4, length, 2)
    inside = torch.rand(4, length) < 0.7
    inside[0] = False
    scores, first, last = best_spans(logits, inside, n_best=length, max_length=3)
    for row in range(4):
        expected = sorted(
            (
                float(logits[row, i, 0].double() + logits[row, j, 1].double())
                for i, j in itertools.product(range(length), repeat=2)
                if inside[row, i] and inside[row, j] and 0 <= j - i < 3
            ),
            reverse=True,
        )[:length]
        real = scores[row] > -1e29
        assert scores[row][real].tolist() == pytest.approx(expected, abs=1e-12)
        assert all(0 <= b - a < 3 for a, b in zip(first[row][real].tolist(), last[row][real].tolist(), strict=True))


@pytest.fixture(scope="module")
def windows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qa")
    write_squad(folder / "dev-v2.0.json", 10)
    write_teacher(folder / "teacher")
    teacher = Teacher.load(folder / "teacher", TASKS["squad_v2"].spec)
    rows = read_split(TASKS["squad_v2"], str(folder / "dev-v2.0.json"))
    return rows, encode_task(rows, TASKS["squad_v2"].spec, teacher.tokenizer, 24, stride=4), teacher


def test_a_model_that_points_at_the_labels_is_always_right(windows):
    """Windows added in any order; overlapping windows without the answer must not win."""
    rows, data, _ = windows
    collector = AnswerCollector(data)
    for chosen in np.array_split(np.random.default_rng(0).permutation(len(data)), 7):
        batch = data.collate(chosen)
        logits = torch.zeros(*batch.input_ids.shape, 2)
        for place in range(len(chosen)):
            for side in range(2):
                logits[place, batch.labels[place, side], side] = 5.0
        collector.add(chosen, logits)
    answers = collector.answers()
    metrics = answer_metrics(answers, rows.golds, no_answer=True)
    assert metrics == {"exact_match": 1.0, "f1": 1.0, "answered_f1": 1.0, "unanswered_accuracy": 1.0}
    assert all(a.best[0] == (a.text, a.score) for a in answers)
    assert all(len(a.best) <= 20 for a in answers)


def test_evaluation_is_the_same_whatever_the_batches(windows):
    rows, data, teacher = windows
    one, many = (answers_of(teacher.model, data, TASKS["squad_v2"].spec, batch_size=size) for size in (1, 64))
    assert [a.text for a in one] == [a.text for a in many]
    assert [a.score for a in one] == pytest.approx([a.score for a in many], abs=1e-5)  # other GEMM shapes
    metrics = evaluate(teacher.model, data, TASKS["squad_v2"].spec)
    exact, f1 = reference([a.at(0.0) for a in many], rows.golds, True)
    assert (metrics["exact_match"], metrics["f1"]) == pytest.approx((exact, f1), abs=1e-6)


def test_threshold_is_the_best_of_all(windows):
    rng = random.Random(1)
    golds = [Gold(("cat",) if rng.random() < 0.5 else (), (0,)) for _ in range(40)]
    golds = [Gold(g.texts, g.starts[: len(g.texts)]) for g in golds]
    answers = [Answer(rng.choice(["cat", "dog"]), 0.0, round(rng.gauss(0.5, 1), 1), ()) for _ in golds]

    def f1(threshold):
        return answer_metrics(answers, golds, no_answer=True, threshold=threshold)["f1"]

    tried = [x / 20 for x in range(-100, 100)]
    assert f1(best_threshold(answers, golds)) == pytest.approx(max(map(f1, tried)), abs=1e-6)


def test_diverged_scores_are_refused(windows):
    _, data, _ = windows
    with pytest.raises(FloatingPointError, match="diverged"):
        AnswerCollector(data).add(np.array([0]), torch.full((1, int(data.lengths[0]), 2), float("nan")))


def test_real_questions_keep_their_answers(windows):
    """SQuAD's own text: every gold answer can be reached through tokens and comes back, but for case and spacing."""
    if not SHARED.is_file():
        pytest.skip(f"{SHARED} is not there")
    teacher = windows[2]
    data = load_task(DataConfig(task="squad_v2", train=str(SHARED), max_train=300, max_held_out=100))
    encoded = encode_task(data.train, data.spec, teacher.tokenizer, 96, stride=24)
    reached = {
        int(encoded.spans.question[i])
        for i in range(len(encoded))
        if encoded.labels[i].any()
        and data.train.texts[1][encoded.spans.question[i]][
            encoded.spans.start[encoded.offsets[i] + encoded.labels[i][0]] : encoded.spans.end[
                encoded.offsets[i] + encoded.labels[i][1]
            ]
        ]
        == data.train.golds[encoded.spans.question[i]].texts[0]
    }
    answerable = {i for i, gold in enumerate(data.train.golds) if gold.texts}
    assert len(reached) > 0.97 * len(answerable)  # the rest: answers that begin or end inside a token
