"""Comparisons against scikit-learn, SciPy and statistics' own results; baselines; sentences; predictions files."""

from dataclasses import replace

import numpy as np
import pytest
from evidence_toys import SPEC, logits, pairs, task
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from engine.data import Rows, TaskData, TaskSpec
from engine.errors import UserError
from engine.evaluation.metrics import compute_metrics
from engine.evaluation.simple import FLOOR
from search.evidence import Answers, Comparison, bag_of_words, compare, majority, read_predictions, write_predictions
from search.evidence import baselines as module
from search.evidence.compare import Difference, Score
from search.evidence.resample import _counts, default_resamples, resampled
from search.evidence.verdict import advice, sentence

REGRESSION = TaskSpec("toy", "regression", ("a", "b"), "y", metric="pearson")
SPANS = TaskSpec("toy", "question_answering", ("question", "context"), "answers", metric="f1")
CHOICE = TaskSpec("toy", "multiple_choice", ("s", "a", "b", "c"), "label", ("0", "1", "2"))


def named(classes, name):
    return TaskSpec("toy", "classification", ("text",), "label", tuple(map(str, range(classes))), metric=name)


CASES = [
    *((named(2, name), 37) for name in ("accuracy", "f1", "mcc", "neg_log_loss")),
    *((named(7, name), 23) for name in ("accuracy", "f1", "mcc", "neg_log_loss")),
    *((named(2, name), 3) for name in ("f1", "mcc")),
    *((replace(REGRESSION, metric=name), n) for name in ("pearson", "spearman") for n in (41, 3)),
    (CHOICE, 19),
]


def answers_for(spec, count, seed=1):
    rng = np.random.default_rng(seed)
    if spec.kind == "regression":
        labels = np.round(rng.normal(size=count), 1).astype(np.float32)  # rounded: ties
        return np.round(labels + rng.normal(size=count), 0).astype(np.float32)[:, None] * 7 + 1000, labels
    labels = rng.integers(0, spec.num_labels, count)
    return logits(labels, 0.6, spec.num_labels, seed), labels


@pytest.mark.parametrize(("spec", "count"), CASES, ids=[f"{s.kind}-{s.num_labels}-{s.metric}-{n}" for s, n in CASES])
def test_each_resample_is_measured_as_scikit_learn_and_scipy_measure_its_rows(spec, count):
    rows, labels = answers_for(spec, count)
    got = resampled(spec, rows, labels, resamples=60, seed=5)
    for value, drawn in zip(got, np.concatenate(list(_counts(count, 60, 5))), strict=True):
        assert drawn.sum() == count
        chosen = np.repeat(np.arange(count), drawn.astype(int))
        assert value == pytest.approx(compute_metrics(spec, rows[chosen], labels[chosen])[spec.metric], abs=1e-9)
    assert spec.head.metric(spec, rows, labels) == compute_metrics(spec, rows, labels)[spec.metric]


def test_blocks_draw_what_one_block_draws(monkeypatch):
    rows, labels = answers_for(named(3, "f1"), 31)
    whole = resampled(named(3, "f1"), rows, labels, resamples=50, seed=2)
    monkeypatch.setattr("search.evidence.resample._BLOCK", 100)
    assert np.array_equal(resampled(named(3, "f1"), rows, labels, resamples=50, seed=2), whole)


def test_question_answering_is_compared_by_the_scores_of_its_questions():
    scores = np.random.default_rng(0).random((30, 2)).astype(np.float32)
    better = np.clip(scores + 0.3, 0, 1)
    found = compare(Answers("a", better), Answers("b", scores), None, SPANS)
    assert found.value == pytest.approx(float((better - scores)[:, 1].astype(float).mean()))
    assert found.low > 0
    exact = compare(Answers("a", better), Answers("b", scores), None, replace(SPANS, metric="exact_match"))
    assert exact.value == pytest.approx(float((better - scores)[:, 0].astype(float).mean()))


def test_the_interval_of_an_accuracy_is_the_binomial_one():
    count, right = 400, 312
    labels = np.zeros(count, dtype=np.int64)
    rows = np.where(np.arange(count)[:, None] < right, [[1.0, 0.0]], [[0.0, 1.0]]).astype(np.float32)
    score = Comparison(labels, SPEC, resamples=4000).score(Answers("a", rows))
    low, high = (binom.ppf(q, count, right / count) / count for q in (0.025, 0.975))
    assert score.value == right / count
    assert score.low == pytest.approx(low, abs=0.004)
    assert score.high == pytest.approx(high, abs=0.004)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """300 samples of 250 rows from two models whose true difference is known; the binomial allows 92 % to 97.7 %."""
    rng, count, held = np.random.default_rng(0), 250, 0
    labels = np.zeros(count, dtype=np.int64)
    for seed in range(300):
        kind = rng.choice(4, size=count, p=[0.6, 0.15, 0.08, 0.17])  # both right, first only, second only, none
        first, second = np.isin(kind, (0, 1)), np.isin(kind, (0, 2))
        rows = [np.stack([hit, ~hit], axis=1).astype(np.float32) for hit in (first, second)]
        got = compare(Answers("a", rows[0]), Answers("b", rows[1]), labels, SPEC, resamples=400, seed=seed)
        held += got.low <= 0.07 <= got.high
    assert 0.91 <= held / 300 <= 0.98


def test_pairing_narrows_the_interval_and_counts():
    labels = np.random.default_rng(0).integers(0, 2, 300)
    rows = logits(labels, 0.7, 2, seed=1)
    other = rows.copy()
    changed = np.flatnonzero(rows.argmax(axis=1) == labels)[:12]
    other[changed] = -other[changed]
    comparison = Comparison(labels, SPEC)
    a, b = Answers("a", rows), Answers("b", other)
    gap, scores = comparison.difference(a, b), [comparison.score(x) for x in (a, b)]
    assert gap.value == pytest.approx(12 / 300)
    assert gap.words == "better than"
    assert scores[1].high > scores[0].low, "their own intervals overlap"
    assert gap.high - gap.low < 0.6 * (scores[0].high - scores[0].low)
    assert comparison.difference(b, a).words == "worse than"


@pytest.mark.parametrize("spec", [named(3, "accuracy"), named(2, "mcc"), REGRESSION], ids=lambda s: s.metric)
def test_a_model_is_level_with_itself_and_seeds_decide(spec):
    rows, labels = answers_for(spec, 50)
    same = compare(Answers("a", rows), Answers("b", rows.copy()), labels, spec)
    assert (same.value, same.low, same.high, same.words) == (0, 0, 0, "level with")
    if spec.kind == "regression":
        scaled = compare(Answers("a", rows), Answers("b", 3 * rows - 7), labels, spec)
        assert (scaled.low, scaled.high, scaled.words) == (0, 0, "level with"), "rounding is no difference"
    other, _ = answers_for(spec, 50, seed=9)
    results = [compare(Answers("a", rows), Answers("b", other), labels, spec, seed=s) for s in (0, 0, 1)]
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_wrong_answers_are_refused():
    labels = np.zeros(4, dtype=np.int64)
    good = Answers("a", np.zeros((4, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="3 answers to 4 rows"):
        compare(good, Answers("b", np.zeros((3, 2), dtype=np.float32)), labels, SPEC)
    with pytest.raises(ValueError, match=r"b: has no answers \(none of it\)"):
        compare(good, Answers("b", None, note="none of it"), labels, SPEC)
    with pytest.raises(FloatingPointError):
        compare(good, Answers("b", np.full((4, 2), np.nan, dtype=np.float32)), labels, SPEC)
    with pytest.raises(ValueError, match="0 answers"):
        compare(Answers("a", np.zeros((0, 2))), good, labels[:0], SPEC)


def test_huge_splits_get_fewer_resamples():
    assert default_resamples(4000) == default_resamples(1) == 1000
    assert 200 < default_resamples(400_000) < 1000
    assert default_resamples(10**9) == 200


# baselines


@pytest.mark.parametrize("classes", [2, 3])
def test_bag_of_words_beats_majority_and_is_scikit_learns_pipeline(classes):
    data = task(classes)
    words, constant = bag_of_words(data), majority(data)
    assert compare(words, constant, data.dev.labels, data.spec).words == "better than"
    best = None
    for strength in module.STRENGTHS:
        vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
        pipeline = make_pipeline(vectors, LogisticRegression(C=strength, max_iter=200))
        pipeline.fit(data.train.texts[0], data.train.labels)
        score = pipeline.score(data.select.texts[0], data.select.labels)
        if best is None or score > best[0]:
            best = score, pipeline.predict_log_proba(data.dev.texts[0])
    np.testing.assert_allclose(words.rows, best[1], atol=1e-5)
    assert np.array_equal(bag_of_words(data, seed=3).rows, words.rows)


def test_majority_is_the_most_frequent_class_of_train():
    data = task()
    labels = np.where(np.arange(len(data.train)) < 100, 1, 0).astype(np.int64)
    constant = majority(replace(data, train=replace(data.train, labels=labels)))
    assert constant.rows.shape == (70, 2)
    np.testing.assert_allclose(np.exp(constant.rows), np.tile([[0.375, 0.625]], (70, 1)), rtol=1e-5)
    assert "good" in constant.note


def test_pairs_are_told_apart_by_what_they_share():
    splits = [pairs(n, seed) for seed, n in enumerate((400, 30, 60, 90))]
    data = TaskData(REGRESSION, *splits, text=[])
    assert REGRESSION.head.metric(REGRESSION, bag_of_words(data).rows, data.dev.labels) > 0.9
    constant = majority(data)
    assert np.unique(constant.rows) == pytest.approx([float(np.mean(data.train.labels, dtype=np.float64))])
    assert REGRESSION.head.metric(REGRESSION, constant.rows, data.dev.labels) == 0
    spec = TaskSpec("toy", "classification", ("a", "b"), "y", ("no", "yes"), metric="mcc")
    data = TaskData(spec, *(pairs(n, s, number=False) for s, n in enumerate((400, 30, 60, 90))), text=[])
    assert spec.head.metric(spec, bag_of_words(data).rows, data.dev.labels) > 0.8


def test_features_are_limited(monkeypatch):
    monkeypatch.setattr(module, "MAX_FEATURES", 20)
    monkeypatch.setattr(module, "MAX_ROWS", 50)
    data = task()
    assert bag_of_words(data).note.startswith("20 features, 50 of 160 rows")
    data = TaskData(REGRESSION, *(pairs(n, s) for s, n in enumerate((60, 30, 30, 30))), text=[])
    assert bag_of_words(data).note.startswith("20 features")


def test_a_class_missing_in_train_gets_a_finite_answer():
    data = task(3)
    kept = np.flatnonzero(data.train.labels != 1)
    data = replace(data, train=data.train.take(kept))
    for made in (bag_of_words(data), majority(data)):
        assert made.rows.shape == (70, 3)
        assert (made.rows[:, 1] == FLOOR).all()
        assert np.isfinite(
            compute_metrics(replace(data.spec, metric="neg_log_loss"), made.rows, data.dev.labels)["neg_log_loss"]
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: replace(d, train=d.train.take(np.flatnonzero(d.train.labels == 1))), "all of one class"),
        (lambda d: replace(d, train=Rows((["?"] * 8,), np.arange(8) % 2)), "have no words"),
        (lambda d: replace(d, spec=CHOICE), "there is none for multiple choice"),
        (lambda d: replace(d, spec=SPANS), "there is none for question answering"),
    ],
)
def test_without_a_bag_of_words_there_is_a_reason(change, reason):
    made = bag_of_words(change(task()))
    assert made.rows is None
    assert reason in made.note
    if "none" in reason:
        assert majority(change(task())).rows is None


# sentences

FOUND = Score("found", 0.7921, 0.78, 0.805)
GAPS = [
    Difference("bag_of_words", 0.0512, 0.0392, 0.0633),
    Difference("uniform", 0.002, -0.006, 0.0104),
    Difference("teacher", -0.009, -0.0163, -0.0021),
    Difference("majority", 0.29, 0.25, 0.33),
]
TITLES = {"uniform": "the best uniform student"}


def test_the_verdict_is_one_sentence():
    assert sentence("accuracy", FOUND, GAPS, 4000, titles=TITLES) == (
        "found: accuracy 0.792 on dev (4,000 rows): better than bag of words (+5.1 points, 95 % interval +3.9 to +6.3),"
        " level with the best uniform student (+0.2, -0.6 to +1.0), 0.9 below its teacher (-1.6 to -0.2)."
    )
    assert sentence("mcc", FOUND, [], 7) == "found: mcc 0.792 on dev (7 rows)."
    assert advice(GAPS, 4000, titles=TITLES) == []


def test_the_verdict_of_a_bad_model_says_so_and_what_to_try():
    worse = [
        Difference("bag_of_words", -0.03, -0.05, -0.01),
        Difference("uniform", -0.02, -0.03, -0.01),
        Difference("teacher", 0.02, 0.01, 0.03),
        Difference("majority", 0.0, -0.01, 0.01),
    ]
    assert sentence("f1", FOUND, worse, 90, titles=TITLES) == (
        "found: f1 0.792 on dev (90 rows): worse than bag of words (-3.0 points, 95 % interval -5.0 to -1.0), worse"
        " than the best uniform student (-2.0, -3.0 to -1.0), 2.0 above its teacher (+1.0 to +3.0), level with a"
        " constant answer (+0.0, -1.0 to +1.0)."
    )
    lines = advice(worse, 90, titles=TITLES)
    assert [any(words in line for line in lines) for words in ("--budget.params", "best uniform", "only 90 rows")] == [
        True, True, True,
    ]  # fmt: skip
    weak = Difference("bag_of_words", -0.01, -0.02, 0.01)
    assert "look at the teacher" in advice(worse[:1], 4000, teacher_over_words=weak)[0]
    assert all("\n" not in line for line in lines)


def test_log_likelihoods_are_told_as_they_are():
    text = sentence("neg_log_loss", Score("found", -0.5, -0.6, -0.4), [Difference("teacher", -0.1, -0.2, -0.05)], 10)
    assert (
        text == "found: neg_log_loss -0.500 on dev (10 rows): 0.100 below its teacher (95 % interval -0.200 to -0.050)."
    )
    tiny = sentence("accuracy", FOUND, [Difference("x", -0.0001, -0.0001, 0.0001)], 10)
    assert "(+0.0 points, 95 % interval +0.0 to +0.0)" in tiny


# files


@pytest.mark.parametrize("spec", [named(3, "f1"), REGRESSION, SPANS], ids=lambda s: s.kind)
def test_predictions_survive_the_file(tmp_path, spec):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(11, 2 if (spec.head.label_dtype is None) else spec.num_labels)).astype(np.float32)
    labels = None if (spec.head.label_dtype is None) else np.arange(11) % max(2, spec.num_labels)
    path = write_predictions(tmp_path, "found", rows, labels, spec)
    assert path == tmp_path / "predictions" / "found.npz"
    first = path.read_bytes()
    read, gold = read_predictions(tmp_path, "found")
    assert np.array_equal(read, rows)
    assert (gold is None) == (spec.head.label_dtype is None)
    if labels is not None:
        assert np.array_equal(gold, labels)
        assert gold.dtype == (np.float32 if spec.kind == "regression" else np.int64)
    write_predictions(tmp_path, "found", rows, labels, spec)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["found.npz"]


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "pickle", "other", "shape"])
def test_damaged_predictions_end_in_one_line(tmp_path, damage):
    path = write_predictions(tmp_path, "found", np.zeros((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64), SPEC)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage == "text":
        path.write_text("nonsense")
    elif damage == "pickle":
        np.savez(path, logits=np.array([{}, []], dtype=object), labels=np.zeros(2))
    elif damage == "other":
        np.savez(path, something=np.zeros(2))
    else:
        np.savez(path, logits=np.zeros(4, dtype=np.float32), labels=np.zeros(4))
    with pytest.raises(UserError, match="resume the run") as caught:
        read_predictions(tmp_path, "found")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../found", "", "a/b", ".hidden"])
def test_a_name_stays_in_its_folder(tmp_path, name):
    with pytest.raises(ValueError, match="no name"):
        write_predictions(tmp_path, name, np.zeros((1, 2)), np.zeros(1), SPEC)


def test_answers_that_do_not_fit_are_not_written(tmp_path):
    for rows, labels in ((np.zeros((3, 3)), np.zeros(3)), (np.zeros((3, 2)), np.zeros(2)), (np.zeros((3, 2)), None)):
        with pytest.raises(ValueError, match="answers"):
            write_predictions(tmp_path, "found", rows, labels, SPEC)
    assert not (tmp_path / "predictions").exists()
