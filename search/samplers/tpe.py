"""The `tpe` sampler: Optuna's tree-structured Parzen estimator over the genes, all genes jointly.

Source: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011; the multivariate form is that of
BOHB (Falkner et al., ICML 2018). Rejected: the univariate form, which cannot see that layers share one budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from search.samplers.library import LibrarySampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


class TPESampler(LibrarySampler):
    """Tree-structured Parzen estimator. Arguments as for `LibrarySampler`."""

    name = "tpe"

    def _optuna(self, seed: int) -> BaseSampler:
        from optuna.samplers import TPESampler as Sampler

        return Sampler(seed=seed, multivariate=True, n_startup_trials=1)
