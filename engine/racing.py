"""Racing: candidates that cannot reach the front any more stop before all data has been seen.

The data is cut at random into slices. After each slice every candidate is compared with the leader, the best so far, on
the examples both have answered, and candidates that will hardly end level with it are dropped. Whoever is left answers
all examples, so **survivors' scores are those of a full evaluation, exactly**; dropped ones keep the mean over what
they answered. Scores are means of a per-example score of 0 or 1 (accuracy).

The bound. What is uncertain is not some population but the score over *these* N examples, m of which have been drawn
without replacement. Of those the leader got w right that the candidate got wrong, and the candidate l that the leader
got wrong. The final difference is w - l plus the same count over the N - m examples to come. With Jeffreys' prior on
the two rates (w and l half an example more each) it is close to normal, with

    mean (w - l) + (N - m) d    and    variance (N - m) N / m (e - d^2),    d = (w - l) / m,  e = (w + l + 1) / m

the factor N / m being the uncertainty of the rates themselves. That gives each candidate's probability of ending level
with the leader or better. Candidates are dropped in rising order of it as long as the *sum* over all dropped ones stays
within (1 - confidence) / (looks at the data): the union bound over candidates and looks, with the allowance spent where
it is needed. So the best of the full data (with ties, all of the best) is lost with probability 1 - confidence at most,
over the random order of the data and as far as the normal approximation goes; at confidence 0.8, where it can be
counted, 1 % of simulated races lose it (`tests/engine/test_racing.py`).

Rejected: empirical Bernstein bounds and McNemar's exact test at a level divided by all comparisons. Both hold for any
m, but of 200 candidates of the demo neither drops a single one before the data ends.

Source: Maron and Moore, "Hoeffding Races", NeurIPS 1994, for the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

CONFIDENCE = 0.99
MIN_APART = 5
"""Examples on which two candidates must have disagreed before the normal approximation is used on them."""


@dataclass(frozen=True)
class Finish:
    """How a candidate ended a race.

    Attributes:
        score: mean over the answered examples; over all of them for survivors.
        answered: examples answered.
        survived: whether it answered all examples.
    """

    score: float
    answered: int
    survived: bool


def race(
    answer: Callable[[list[int], int], np.ndarray],
    sizes: Sequence[int],
    candidates: int,
    *,
    confidence: float = CONFIDENCE,
    costs: Sequence[float] | None = None,
) -> list[Finish]:
    """Runs a race.

    Args:
        answer: `answer(alive, slice)` gives bool [len(alive), sizes[slice]]: which examples of a slice the candidates
            at these positions get right.
        sizes: examples per slice, in the order of the slices.
        candidates: K.
        confidence: least probability that no candidate of the front is dropped.
        costs: one per candidate: the front is then all those for which no cheaper or equally cheap one scores better.
            None: the front is the best score.

    Returns:
        One entry per candidate.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: must lie between 0 and 1")
    total, looks = int(sum(sizes)), max(len(sizes) - 1, 1)
    prices = np.zeros(candidates) if costs is None else np.asarray(costs, dtype=np.float64)
    alive = np.arange(candidates)
    right = np.zeros((candidates, 0), dtype=bool)
    finished: dict[int, Finish] = {}
    for index in range(len(sizes)):
        right = np.concatenate([right, answer(alive.tolist(), index)], axis=1)
        if index == len(sizes) - 1:
            break
        dropped = hopeless(chances(right, total, prices[alive]), (1 - confidence) / looks)
        for place in np.flatnonzero(dropped):
            finished[int(alive[place])] = Finish(float(right[place].mean()), right.shape[1], False)
        alive, right = alive[~dropped], right[~dropped]
    for place, position in enumerate(alive.tolist()):
        finished[position] = Finish(float(right[place].mean()), total, True)
    return [finished[i] for i in range(candidates)]


def chances(right: np.ndarray, total: int, costs: np.ndarray) -> np.ndarray:
    """float64 [A]: each candidate's probability of ending level with its leader or better; 1 for leaders.

    Args:
        right: bool [A, m], answers so far.
        total: N, all examples.
        costs: [A]; a candidate's leader is the best so far of those that cost no more.
    """
    scores = right.sum(axis=1)
    leaders = np.array([np.argmax(np.where(costs <= cost, scores, -1)) for cost in costs])
    wins = (right[leaders] & ~right).sum(axis=1)
    losses = (right & ~right[leaders]).sum(axis=1)
    return level_probability(wins, losses, right.shape[1], total)


def level_probability(wins: np.ndarray, losses: np.ndarray, answered: int, total: int) -> np.ndarray:
    """P(a leader with these wins and losses against a candidate does not end ahead of it); see the module."""
    left, apart, lead = total - answered, wins + losses, wins - losses
    rate = lead / answered
    variance = left * total / answered * ((apart + 1) / answered - rate**2)
    # half an example of continuity: leads are whole numbers, and level is enough
    chance = ndtr((0.5 - (lead + left * rate)) / np.sqrt(np.maximum(variance, 1e-12)))
    chance = np.where((apart < MIN_APART) | (lead <= 0), 1.0, chance)
    return np.where(lead > left, 0.0, chance)


def hopeless(chance: np.ndarray, allowance: float) -> np.ndarray:
    """bool [A]: the candidates of lowest chance, as many as together stay within the allowance."""
    order = np.argsort(chance, kind="stable")
    spent = np.cumsum(chance[order])
    result = np.zeros(len(chance), dtype=bool)
    result[order[spent <= allowance]] = True
    return result
