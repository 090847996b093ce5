"""Racing: winners keep their exact scores, losers leave early, and the verdicts are right at the stated level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import hypergeom

from engine.racing import lead_probability, race, rival_mask, wins_needed


def run(right, slices=8, seed=0, **options):
    """Races the rows of a bool matrix [K, N], its columns in a random order; returns finishes and answers asked for."""
    order = np.random.default_rng(seed).permutation(right.shape[1])
    parts = np.array_split(order, slices)
    asked = []

    def answer(alive, index):
        asked.append(len(alive) * len(parts[index]))
        return right[np.ix_(alive, parts[index])]

    return race(answer, [len(p) for p in parts], len(right), **options), sum(asked)


def answers(rng, skills, examples, noise=0.1):
    """Candidates that mostly agree: a common difficulty per example, own noise."""
    difficulty = rng.normal(size=examples)
    return (np.asarray(skills)[:, None] + noise * rng.normal(size=(len(skills), examples))) > difficulty


def test_survivors_have_exact_scores_and_losers_stop_early():
    rng = np.random.default_rng(0)
    right = answers(rng, np.linspace(-1, 1, 50), 600)
    finishes, asked = run(right)
    best = right.mean(axis=1).max()
    assert asked < 0.5 * right.size
    for finish, row in zip(finishes, right, strict=True):
        assert finish.survived == (finish.answered == 600)
        if finish.survived:
            assert finish.score == row.mean()
        else:
            assert row.mean() < best
    assert all(f.survived for f, row in zip(finishes, right, strict=True) if row.mean() == best)


def test_the_best_is_dropped_at_most_as_often_as_stated():
    """2,000 races of 12 nearly equal candidates at confidence 0.8.

    The union bound is conservative, so far fewer than 20 % lose a best candidate; asserted is the statement itself.
    """
    rng = np.random.default_rng(1)
    lost = 0
    for seed in range(2000):
        right = answers(rng, rng.normal(scale=0.05, size=12), 64)
        scores = right.mean(axis=1)
        finishes, _ = run(right, seed=seed, confidence=0.8)
        lost += not all(f.survived for f, s in zip(finishes, scores, strict=True) if s == scores.max())
    assert lost <= 0.2 * 2000


def test_ties_with_the_best_survive():
    right = np.zeros((6, 40), dtype=bool)
    right[:, :20] = True
    right[3:, :] = ~right[3:, :]  # as good over all examples, on others
    finishes, _ = run(right, slices=10)
    assert all(f.survived and f.score == 0.5 for f in finishes)


def test_equal_answers_survive_together():
    finishes, _ = run(np.tile(np.arange(30) % 3 > 0, (4, 1)), slices=5)
    assert [f.score for f in finishes] == [20 / 30] * 4


def test_one_slice_and_one_candidate():
    finishes, asked = run(np.ones((1, 7), dtype=bool), slices=1)
    assert (finishes[0].score, finishes[0].survived, asked) == (1.0, True, 7)


def test_a_candidate_is_dropped_only_by_one_that_costs_no_more():
    right = np.zeros((3, 200), dtype=bool)
    right[0] = True
    finishes, _ = run(right, costs=[10, 5, 10])
    assert [f.survived for f in finishes] == [True, True, False]
    assert rival_mask(2, [1, 2]).tolist() == [[True, True], [False, True]]


def test_a_lead_larger_than_what_is_left_is_certain():
    # 31 of 31 disagreements won, 30 examples left: no tie possible any more
    assert lead_probability(31, 30)[-1] == 0
    assert lead_probability(30, 30)[-1] > 0
    assert wins_needed(31, 61, 1e-300)[31] == 31


@pytest.mark.parametrize("disagreements", [1, 2, 3, 8, 21])
def test_the_probability_is_the_worst_over_all_unseen_disagreements(disagreements):
    wins = np.arange(disagreements // 2 + 1, disagreements + 1)
    for left in (0, 1, 2, 7, 30):
        every = [
            hypergeom.sf(wins - 1, disagreements + n, marked, disagreements)
            for n in range(left + 1)
            for marked in range((disagreements + n) // 2 + 1)
        ]
        np.testing.assert_allclose(lead_probability(disagreements, left), np.max(every, axis=0), rtol=1e-9, atol=1e-15)


def test_the_probability_counts_orders_of_drawing():
    # 5 disagreements in all, of which v wins 2: how often does v win both of the first two?
    orders = list(itertools.permutations([1, 1, 0, 0, 0]))
    share = np.mean([sum(order[:2]) == 2 for order in orders])
    assert lead_probability(2, 3)[-1] == pytest.approx(max(share, hypergeom.sf(1, 4, 2, 2)))


def test_a_confidence_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="confidence"):
        race(lambda alive, index: np.ones((1, 1), dtype=bool), [1], 1, confidence=1.0)
