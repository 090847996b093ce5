"""What the `tpe` and `nsga2` samplers share: Optuna's samplers over the fixed categories of `search.samplers.genome`.

Every trial enters an Optuna study in memory with the genes of the architecture that was really evaluated, which may
differ from the genes that were asked for. Optuna's own random state is not part of a sampler's: each proposal seeds it
anew from ours, so that a loaded state continues as the saved one.

A failed trial enters with the worst score so far: Optuna passes over failed trials, and would propose their like again.

Rejected: Optuna's `ask`/`tell` on the ledger's own study. Trials proposed and never finished would stay in it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture
from search.samplers.base import Observation, Sampler, Space
from search.samplers.genome import Genes, categories, express, genes

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler

ASKS = 4
"""Proposals asked of Optuna before its last one is mutated into something new."""
MUTATIONS = 32
BEST = 8
"""Best trials whose expressions a proposal may take."""


class LibrarySampler(Sampler):
    """Common part; see the module.

    Args:
        space, seed, initial: see `Sampler`.
        startup: finished trials before Optuna is asked; until then candidates are random.
    """

    def __init__(self, space: Space, seed: int, *, initial: Sequence[Architecture] = (), startup: int = 20) -> None:
        super().__init__(space, seed, initial=initial)
        if startup < 1:
            raise ValueError(f"startup {startup}: must be at least 1")
        self.startup = startup
        self._study: Study | None = None
        self._worst: float | None = None
        self._learned = 0

    @property
    def directions(self) -> tuple[str, ...]:
        """Of the objectives, in Optuna's words."""
        return ("maximize",)

    @abstractmethod
    def _optuna(self, seed: int) -> BaseSampler:
        """A fresh Optuna sampler."""

    def _values(self, observation: Observation) -> list[float]:
        """Objectives of a trial, for `directions`."""
        score = observation.score
        if score is not None:
            self._worst = score if self._worst is None else min(self._worst, score)
        return [score if score is not None else (0.0 if self._worst is None else self._worst)]

    def _attributes(self, number: int) -> dict[str, Any]:
        """System attributes of trial `number`."""
        return {}

    def _before_asking(self, study: Study) -> None:
        """Called before each question, when the study has its sampler."""

    def _learn(self, observation: Observation) -> None:
        from optuna.trial import create_trial

        trial = create_trial(
            params=genes(self.space, observation.architecture),
            distributions=self._distributions(observation.architecture),
            values=self._values(observation),
            system_attrs=self._attributes(self._learned),
        )
        self._learned += 1
        self._made().add_trial(trial)

    def _forget(self) -> None:
        self._study = self._worst = None
        self._learned = 0

    def _choose(self) -> Architecture | None:
        if len(self.observed) < self.startup:
            return self._first_new(self._sample)
        asked = self.observed[-1].architecture
        for _ in range(ASKS):
            asked = self._into_space(self._express(self._ask()))
            found = self._accept(asked)
            if found is not None:
                return found
        for _ in range(MUTATIONS):
            found = self._accept(self._mutation(asked))
            if found is not None:
                return found
        return None

    def _ask(self) -> Genes:
        import optuna

        study = self._made()
        study.sampler = self._optuna(int(self._rng.integers(2**31)))
        self._before_asking(study)
        asked = study.ask(self._distributions(self.observed[0].architecture))
        study.tell(asked, state=optuna.trial.TrialState.FAIL)  # only proposed: samplers pass over failed trials
        return asked.params

    def _express(self, wanted: Genes) -> Architecture:
        scored = [o for o in self.observed if o.score is not None]
        best = sorted(scored, key=lambda o: -(o.score or 0.0))[:BEST]
        return express(self.space, wanted, self.observed[0].architecture, [o.architecture for o in best], self._rng)

    def _into_space(self, architecture: Architecture) -> Architecture:
        return architecture if self.space.contains(architecture) else self._mutation(architecture)

    def _distributions(self, like: Architecture) -> dict[str, Any]:
        from optuna.distributions import CategoricalDistribution

        return {name: CategoricalDistribution(v) for name, v in categories(self.space, len(like)).items()}

    def _made(self) -> Study:
        if self._study is None:
            import optuna

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            directions: Any = list(self.directions)
            self._study = optuna.create_study(directions=directions)
        return self._study
