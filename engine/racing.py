"""Racing: candidates that cannot reach the front any more stop before all data has been seen.

The data is cut at random into slices. After each slice every two candidates are compared on the examples both have
answered, and a candidate is dropped if another one is better than it with confidence. Whoever is left answers all
examples, so **survivors' scores are those of a full evaluation, exactly**; dropped ones keep the mean over what they
answered. Scores are means of a per-example score of 0 or 1 (accuracy).

The test. What is uncertain is not some population but the score over *these* N examples, of which m have been drawn
without replacement. Suppose w really is at least as good as v on all N. Among the pairs of answers in which exactly one
of the two is right, M in all, v then wins at most half. The k of them seen so far are a random subset, so the number
b that v has won is at most hypergeometric: P(wins >= b) <= P(Hyper(M, M/2, k) >= b). M is unknown but at most
k + N - m, and the larger the weaker the bound. w is dropped where that probability is below (1 - confidence) divided by
the number of comparisons that could drop it: (K - 1) rivals times (slices - 1) looks. So with probability >= confidence
over the slices' random order the best candidate (with ties, every one of the best) is never dropped. The test is exact
for any m, and at the end certain: if v leads by more than the examples left, the probability is 0.

Rejected: empirical Bernstein and Hoeffding bounds, which need about twice as many examples to tell the same pair apart;
a paired t-test, whose tails are wrong for a handful of disagreements at the levels a union bound asks for; comparing
with the present leader only, which is valid too but drops fewer.

Source: the idea of racing is Maron and Moore's (1994); the conditional test is McNemar's, without replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import gammaln

CONFIDENCE = 0.99


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
    total, rivals = int(sum(sizes)), rival_mask(candidates, costs)
    looks = max(len(sizes) - 1, 1)
    level = (1 - confidence) / (max(candidates - 1, 1) * looks)
    alive = list(range(candidates))
    right = np.zeros((candidates, 0), dtype=bool)
    finished: dict[int, Finish] = {}
    for index in range(len(sizes)):
        right = np.concatenate([right, answer(alive, index)], axis=1)
        if index == len(sizes) - 1:
            break
        dropped = beaten(right, total, level, rivals[np.ix_(alive, alive)])
        for place in np.flatnonzero(dropped):
            finished[alive[place]] = Finish(float(right[place].mean()), right.shape[1], False)
        alive = [a for a, gone in zip(alive, dropped, strict=True) if not gone]
        right = right[~dropped]
    for place, position in enumerate(alive):
        finished[position] = Finish(float(right[place].mean()), total, True)
    return [finished[i] for i in range(candidates)]


def rival_mask(candidates: int, costs: Sequence[float] | None) -> np.ndarray:
    """bool [K, K]: whether candidate i may drop candidate j, because it costs no more."""
    if costs is None:
        return np.ones((candidates, candidates), dtype=bool)
    array = np.asarray(costs, dtype=np.float64)
    return array[:, None] <= array[None, :]


def beaten(right: np.ndarray, total: int, level: float, rivals: np.ndarray) -> np.ndarray:
    """bool [A]: which candidates some rival has beaten at this level.

    Args:
        right: bool [A, m], answers so far.
        total: N, all examples.
        level: largest probability of a wrong verdict on one pair.
        rivals: bool [A, A], whether i may drop j.
    """
    answered = right.shape[1]
    yes = right.astype(np.float32)  # counts up to 2^24 are exact
    wins = np.rint(yes @ (1.0 - yes).T).astype(np.int64)  # [i, j]: examples i gets right and j wrong
    apart = wins + wins.T
    return (rivals & (wins >= wins_needed(answered, total, level)[apart])).any(axis=0)


@lru_cache(maxsize=256)
def wins_needed(answered: int, total: int, level: float) -> np.ndarray:
    """int64 [m + 1]: wins among k = 0..m disagreements that show a lead at this level; k + 1 where none can."""
    ks = np.arange(answered + 1)
    needed = ks + 1
    for k in ks[1:]:
        enough = np.flatnonzero(lead_probability(int(k), total - answered) < level)
        if len(enough):
            needed[k] = k // 2 + 1 + enough[0]
    needed.flags.writeable = False  # shared by all who ask
    return needed


def lead_probability(disagreements: int, left: int) -> np.ndarray:
    """float64: for wins = k // 2 + 1 .. k, the largest P(so many wins or more) of one who does not lead over all.

    Args:
        disagreements: k, seen so far.
        left: examples not seen; the more of them are disagreements, the likelier a lead by chance, so the largest even
            and the largest odd number of disagreements are the worst cases.
    """
    wins = np.arange(disagreements // 2 + 1, disagreements + 1)
    tails = [_tail(wins, m, m // 2, disagreements) for m in {disagreements + left, disagreements + max(left - 1, 0)}]
    return np.max(tails, axis=0)


def _tail(wins: np.ndarray, population: int, marked: int, drawn: int) -> np.ndarray:
    """P(X >= wins), X hypergeometric; `wins` rises by one to `drawn`. (`hypergeom.sf` takes 20 times longer.)"""
    possible = (wins <= marked) & (drawn - wins <= population - marked)
    w = np.where(possible, wins, max(0, drawn - (population - marked)))
    log = _log_choose(marked, w) + _log_choose(population - marked, drawn - w) - _log_choose(population, drawn)
    return np.cumsum(np.where(possible, np.exp(log), 0.0)[::-1])[::-1]


def _log_choose(n: int, k: np.ndarray | int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(np.asarray(k) + 1) - gammaln(n - np.asarray(k) + 1)
