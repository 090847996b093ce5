"""The `gaussian` sampler: a Gaussian process on structure and cost proposes the candidate that may be best.

Scores are standardized, failed trials the worst, outliers below brought near. An architecture is a row of features per
layer (`search.space.features`), each scaled by its spread. With d_l^2 the squared distance of two architectures' rows l
and k_l = exp(-d_l^2 / 2 s^2),

    k = a * mean_l k_l  +  b * mean_{l < m} k_l k_m  +  c * prod_l k_l

(single layers, pairs of layers, all together); s, (a, b, c) and the noise have the highest marginal likelihood on a
small grid, found anew every `refit_every` trials. The proposal is the member of a pool (draws, mutations of the best,
all neighbours of the very best) with the highest mean + `CONFIDENCE` deviations. Candidates still running count as if
they had scored what is expected of them. Measured, and what was tried instead: docs/decisions/0025.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from engine.architecture.architecture import Architecture
from search.samplers.base import Observation, Sampler, Space
from search.samplers.neighbours import neighbours

LENGTHS = (0.15, 0.3, 0.6, 1.2, 2.4)
ORDERS = ((0.8, 0.15, 0.05), (0.5, 0.4, 0.1), (0.3, 0.6, 0.1), (0.2, 0.4, 0.4), (0.05, 0.15, 0.8))
"""Weights of single layers, pairs of layers, and all layers; they sum to 1."""
NOISES = (0.01, 0.03, 0.1, 0.3, 1.0)
SCALE_DRAWS = 256
"""Draws of the space that tell how much each feature varies in it."""
POOL_DRAWS = 200
POOL_MUTATIONS = 64
ELITE = 10
"""Best trials that are mutated."""
NEAR = 3
"""Best trials whose neighbours are all in the pool."""
FAR_BELOW = 3.0
"""Scores this many times as far below the median as the best is above it, or more, count as if they were there."""
CONFIDENCE = 2.0
FIT_TRIALS = 300
"""Trials the kernel is chosen by, at most."""
PREDICT_TRIALS = 1000
"""Trials a prediction uses, at most: its time grows with their third power, its memory with their square."""
AGAIN = 0.4
"""Chance of one mutation more, again after each."""


class Kernel(NamedTuple):
    """Length, weights of the terms, and noise variance in units of the signal's."""

    length: float
    orders: tuple[float, float, float]
    noise: float


class GaussianSampler(Sampler):
    """Gaussian process with an upper confidence bound.

    Args:
        space, seed, initial: see `Sampler`.
        startup: finished trials before the model is asked; until then candidates are random.
        refit_every: finished trials between two choices of the kernel.
    """

    name = "gaussian"

    def __init__(
        self,
        space: Space,
        seed: int,
        *,
        initial: Sequence[Architecture] = (),
        startup: int = 20,
        refit_every: int = 25,
    ) -> None:
        super().__init__(space, seed, initial=initial)
        if startup < 0 or refit_every < 1:
            raise ValueError(f"startup {startup}, refit_every {refit_every}: must be >= 0, >= 1")
        self.startup, self.refit_every = startup, refit_every
        self._rows: list[np.ndarray] = []
        self._scale: np.ndarray | None = None
        self._kernel: tuple[int, Kernel] | None = None
        self._near: dict[Architecture, list[Architecture]] = {}

    def _learn(self, observation: Observation) -> None:
        self._rows.append(self._features(observation.architecture))

    def _forget(self) -> None:
        self._rows, self._kernel = [], None

    def _choose(self) -> Architecture | None:
        from threadpoolctl import threadpool_limits

        if len(self.observed) < max(self.startup, 2):
            return self._first_new(self._sample)
        pool = self._pool()
        if not pool:
            return None
        with threadpool_limits(limits=1, user_api="blas"):  # the same sums in the same order on any number of cores
            bound = self._bound(np.stack([self._features(a) for a in pool]))
        return self._accept(pool[int(np.argmax(bound))])

    def _pool(self) -> list[Architecture]:
        """New candidates, each once."""
        scored = [i for i, o in enumerate(self.observed) if o.score is not None]
        elite = sorted(scored, key=lambda i: (-(self.observed[i].score or 0.0), i))[:ELITE]
        drawn = [self._sample() for _ in range(POOL_DRAWS)]
        for number in range(POOL_MUTATIONS if elite else 0):
            child = self._mutation(self.observed[elite[number % len(elite)]].architecture)
            while self._rng.random() < AGAIN:
                child = self._mutation(child)
            drawn.append(child)
        leading = {self.observed[place].architecture for place in elite[:NEAR]}
        self._near = {best: around for best, around in self._near.items() if best in leading}
        for place in elite[:NEAR]:
            drawn += self._around(self.observed[place].architecture)
        new = {self.space.key(a): a for a in drawn}
        known = [key for key in new if self._is_known(key)]
        return [a for key, a in new.items() if key not in known]

    def _around(self, best: Architecture) -> list[Architecture]:
        """Neighbours of one of the best trials, found once."""
        if best not in self._near:
            self._near[best] = list(neighbours(self.space, best))
        return self._near[best]

    def _bound(self, pool: np.ndarray) -> np.ndarray:
        """Upper confidence bound [P] of pool members with features [P, L, D]."""
        values = self._values(len(self._rows))
        used = informative(values)
        known, values = np.stack([self._rows[i] for i in used]), values[used]
        kernel = self._fitted()
        if self._pending:
            running = np.stack([self._features(a) for a in self._pending.values()])
            expected, _ = predict(kernel, known, values, running)
            known, values = np.concatenate([known, running]), np.concatenate([values, expected])
        mean, deviation = predict(kernel, known, values, pool)
        return mean + CONFIDENCE * deviation

    def _fitted(self) -> Kernel:
        """The kernel of the last choice: a function of the first trials alone, however they were handed in."""
        first = max(self.startup, 2)
        known = first + (len(self._rows) - first) // self.refit_every * self.refit_every
        if self._kernel is None or self._kernel[0] != known:
            some = np.linspace(0, known - 1, min(known, FIT_TRIALS)).astype(int)
            self._kernel = (known, fit(np.stack(self._rows[:known])[some], self._values(known)[some]))
        return self._kernel[1]

    def _values(self, number: int) -> np.ndarray:
        """Standardized scores of the first `number` trials, failed ones as the worst."""
        scores = np.array([np.nan if o.score is None else o.score for o in self.observed[:number]])
        worst = 0.0 if np.isnan(scores).all() else np.nanmin(scores)
        return standardized(np.where(np.isnan(scores), worst, scores))

    def _features(self, architecture: Architecture) -> np.ndarray:
        features = np.asarray(self.space.features(architecture), dtype=np.float64)
        if not np.isfinite(features).all():
            raise ValueError(f"features() of {architecture} gave NaN or infinity")
        if self._scale is None:
            self._scale = self._spread()
        return features / self._scale

    def _spread(self) -> np.ndarray:
        """[L, D] standard deviation of every feature in the space, times the root of how many vary in its layer.

        Features that hardly ever vary count as varying by a quarter of their range, so that they do not outweigh all
        others. The draws are the same for every seed, and leave the sampler's own random state alone.
        """
        rng = np.random.default_rng(0)
        drawn = np.stack([np.asarray(self.space.features(self.space.sample(rng))) for _ in range(SCALE_DRAWS)])
        spread = np.maximum(drawn.std(axis=0), 0.25 * np.ptp(drawn, axis=0))
        varying = np.maximum((spread > 0).sum(axis=1, keepdims=True), 1)
        return np.where(spread > 0, spread, 1.0) * np.sqrt(varying)


def informative(values: np.ndarray) -> np.ndarray:
    """Which of the trials with these values [N] a prediction uses, ascending: all of them; of more than
    `PREDICT_TRIALS` the better half of that number, and as many of the others, evenly over time."""
    if len(values) <= PREDICT_TRIALS:
        return np.arange(len(values))
    best, others = np.split(np.argsort(-values, kind="stable"), [PREDICT_TRIALS // 2])
    spread = np.linspace(0, len(others) - 1, PREDICT_TRIALS - len(best)).astype(int)
    return np.sort(np.concatenate([best, np.sort(others)[spread]]))


def standardized(scores: np.ndarray) -> np.ndarray:
    """Scores [N] with mean 0 and standard deviation 1 (0 where all are equal), those far below the median raised."""
    median = np.median(scores)
    ahead = scores.max() - median
    if ahead <= 0:  # at least half of all are equally good
        return np.where(scores < median, -1.0, 0.0) - np.mean(np.where(scores < median, -1.0, 0.0))
    raised = np.maximum((scores - median) / ahead, -FAR_BELOW)
    return (raised - raised.mean()) / raised.std()


def correlation(kernel: Kernel, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """k [N, M] between architectures with scaled features a [N, L, D] and b [M, L, D]."""
    return _mixed(kernel, _distances(a, b))


def predict(kernel: Kernel, known: np.ndarray, values: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation [M] at scaled features `at` [M, L, D], given values [N] at `known`."""
    covariance = correlation(kernel, known, known) + kernel.noise * np.eye(len(known))
    factor = np.linalg.cholesky(covariance)
    mean = values.mean()
    whitened = np.linalg.solve(factor, np.column_stack([values - mean, correlation(kernel, known, at)]))
    target, cross = whitened[:, 0], whitened[:, 1:]
    signal = max(float(target @ target) / len(known), 1e-12)  # most likely variance, in closed form
    variance = np.maximum(1.0 - (cross**2).sum(axis=0), 1e-9)
    return mean + cross.T @ target, np.sqrt(signal * variance)


def fit(known: np.ndarray, values: np.ndarray) -> Kernel:
    """The kernel of highest marginal likelihood on the grid, the signal's variance chosen in closed form."""
    distances = _distances(known, known)
    centred = values - values.mean()
    best, chosen = -np.inf, Kernel(LENGTHS[-1], ORDERS[1], NOISES[-1])
    for length, orders in product(LENGTHS, ORDERS):
        eigenvalues, vectors = np.linalg.eigh(_mixed(Kernel(length, orders, 0.0), distances))
        rotated = (vectors.T @ centred) ** 2
        for noise in NOISES:
            spectrum = np.maximum(eigenvalues, 0.0) + noise
            signal = max(float((rotated / spectrum).mean()), 1e-12)
            likelihood = -0.5 * (len(values) * np.log(signal) + np.log(spectrum).sum())
            if likelihood > best + 1e-9:
                best, chosen = likelihood, Kernel(length, orders, noise)
    return chosen


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[L, N, M] squared distances of rows."""
    a, b = a.transpose(1, 0, 2), b.transpose(1, 0, 2)
    squares = (a**2).sum(-1)[:, :, None] + (b**2).sum(-1)[:, None, :] - 2 * a @ b.transpose(0, 2, 1)
    return np.maximum(squares, 0.0)


def _mixed(kernel: Kernel, distances: np.ndarray) -> np.ndarray:
    single, pairs, all_layers = kernel.orders
    layers = len(distances)
    each = np.exp(-distances / (2 * kernel.length**2))
    total = each.sum(axis=0)
    mixed = single * total / layers + all_layers * each.prod(axis=0)
    if layers == 1:
        return mixed + pairs * total
    return mixed + pairs * (total**2 - (each**2).sum(axis=0)) / (layers * (layers - 1))
