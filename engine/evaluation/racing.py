"""Racing: candidates that cannot reach the front any more stop before all data has been seen.

The data is cut at random into slices. After each slice, candidates that will hardly end level with the best are
dropped; whoever is left answers all rows, so **survivors' scores are those of a full evaluation, exactly**. Scores are
means of a score of 0 or 1 per row.

The bound. m of N rows are drawn without replacement. Let d be the mean per candidate of the answers less the mean
candidate's, C their covariance (Jeffreys' half a row more for each candidate: I / 2m), t^2 the variance of true rates
that d varies more than C / m explains, K = t^2 (t^2 I + C / m)^-1, s the score so far. Final scores are normal with

    mean s + (N - m) K d    and    covariance (N - m)^2 t^2 (I - K) + (N - m) C

`DRAWS` draws of them tell how often each candidate ends on the front. The unlikeliest are dropped as long as the draws
in which *any* dropped one is on the front stay within 1 - confidence, in equal steps over the looks. Measured, and
other bounds: docs/decisions/0015. Source of the idea: Maron and Moore, "Hoeffding Races", NeurIPS 1994.
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
