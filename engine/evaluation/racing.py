"""Racing: candidates that cannot reach the front any more stop before all data has been seen.

The data is cut at random into slices. After each slice every candidate is compared with the leader, the best so far, on
the examples both have answered, and candidates that will hardly end level with it are dropped. Whoever is left answers
all examples, so **survivors' scores are those of a full evaluation, exactly**; dropped ones keep the mean over what
they answered. Scores are means of a per-example score of 0 or 1 (accuracy).

The bound. What is uncertain is not some population but the scores over *these* N examples, m of which have been drawn
without replacement. Let y be the answers so far less the mean candidate's (what all share moves none ahead), d their
mean per candidate and C their covariance, with Jeffreys' half an example more for each candidate, I / 2m. Candidates'
true rates lie close together, so those behind are likely to have been unlucky: with their variance t^2, estimated from
what d varies more than C / m explains, the rates given the answers are normal with mean K d and covariance t^2 (I - K),
K = t^2 (t^2 I + C / m)^-1, and the final scores with

    mean s + (N - m) K d    and    covariance (N - m)^2 t^2 (I - K) + (N - m) C

s being the score so far. `DRAWS` draws of the final scores tell how often each candidate ends on the front.
Candidates are dropped in rising order of that, as long as the draws in which *any* dropped one is on the front stay
within the allowance: (1 - confidence), in equal steps over the looks at the data; what one look leaves is the next's.
So the best of the full data (with ties, all of the best) is lost with probability 1 - confidence at most, over the
random order of the data and as far as the approximation goes (`tests/engine/test_racing.py` counts).

Where candidates share most of their work that saves less than it asks fewer answers, for smaller batches cost more:
slices of one batch each, as many as there are batches, did best among 4, 5, 6, 8 and 10 for the demo's
supernet.

Measured on 200 candidates of the demo's supernet, 596 examples in 8 slices and 20 random orders of them: 66 % of all
answers are asked for at confidence 0.99; at 0.95, 0.9 and 0.8 the best is kept in 95, 90 and 90 % of the races.
Rejected: each candidate's probability of ending level with today's leader, added up over all dropped: 78 % of the
answers, for the leader is not the only one to be beaten, and candidates err together. Rejected: rates without the
common variance (t infinite): 45 %, but the best was lost in every fourth race at confidence 0.9. Rejected: empirical
Bernstein bounds and McNemar's exact test at a level divided by all comparisons, which drop none before the data ends.

Source: Maron and Moore, "Hoeffding Races", NeurIPS 1994, for the idea.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.99
MIN_APART = 5
"""Examples on which a candidate and its leader must have disagreed before the normal approximation is used on it."""
DRAWS = 4096
"""Of the final scores; an allowance below 1 / DRAWS drops only who is never on the front."""


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
    noise = np.random.default_rng(0).standard_normal((candidates, DRAWS))
    alive, spent = np.arange(candidates), 0.0
    right = np.zeros((candidates, 0), dtype=bool)
    finished: dict[int, Finish] = {}
    for index in range(len(sizes)):
        right = np.concatenate([right, answer(alive.tolist(), index)], axis=1)
        if index == len(sizes) - 1:
            break
        front = on_front(final_scores(right, total, noise), prices[alive])
        front |= undecided(right, prices[alive])[:, None]
        dropped = hopeless(front, (1 - confidence) * (index + 1) / looks - spent)
        spent += float(front[dropped].any(axis=0).mean())
        for place in np.flatnonzero(dropped).tolist():
            finished[int(alive[place])] = Finish(float(right[place].mean()), right.shape[1], False)
        alive, right = alive[~dropped], right[~dropped]
    for place, position in enumerate(alive.tolist()):
        finished[position] = Finish(float(right[place].mean()), total, True)
    return [finished[i] for i in range(candidates)]


def final_scores(right: np.ndarray, total: int, noise: np.ndarray) -> np.ndarray:
    """float64 [A, R]: draws of how many of all examples each candidate gets right; whole numbers. See the module.

    Args:
        right: bool [A, m], answers so far.
        total: N, all examples.
        noise: [>= A, R], standard normal.
    """
    candidates, answered = right.shape
    left, sums = total - answered, right.sum(axis=1)[:, None].astype(np.float64)
    if candidates == 1 or left == 0:
        return np.tile(sums, noise.shape[1])
    ahead = right - right.mean(axis=0)
    lead = ahead.mean(axis=1)
    spread = ahead - lead[:, None]
    covariance = spread @ spread.T / answered + np.eye(candidates) / (2 * answered)
    error = float(np.trace(covariance)) / candidates / answered
    # not below what its own estimate errs by
    variance = max(float(lead.var(ddof=1)) - error, error * np.sqrt(2 / (candidates - 1)))
    gain = variance * np.linalg.inv(variance * np.eye(candidates) + covariance / answered)
    uncertain = left**2 * variance * (np.eye(candidates) - gain) + left * covariance
    factor = np.linalg.cholesky((uncertain + uncertain.T) / 2)
    to_come = left * (right.mean() + gain @ lead)[:, None] + factor @ noise[:candidates]
    return sums + np.clip(np.rint(to_come), 0, left)


def on_front(scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """bool [A, R]: whether no candidate that costs at most as much has a better score; scores [A, R], costs [A]."""
    order = np.argsort(costs, kind="stable")
    best = np.maximum.accumulate(scores[order], axis=0)
    last = np.searchsorted(costs[order], costs, side="right") - 1
    return scores >= best[last]


def undecided(right: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """bool [A]: who has disagreed with its leader, the best so far of those that cost no more, on too few examples."""
    scores = right.sum(axis=1)
    leaders = np.array([np.argmax(np.where(costs <= cost, scores, -1)) for cost in costs])
    return (right != right[leaders]).sum(axis=1) < MIN_APART


def hopeless(front: np.ndarray, allowance: float) -> np.ndarray:
    """bool [A]: those most seldom on the front [A, R], as many as leave it whole but for a share `allowance` of R."""
    order = np.argsort(front.sum(axis=1), kind="stable")
    lost = np.logical_or.accumulate(front[order], axis=0).mean(axis=1)
    result = np.zeros(len(front), dtype=bool)
    result[order[lost <= allowance]] = True
    return result
