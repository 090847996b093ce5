"""Quietens what a run's libraries print, so that progress and errors are all there is to read."""

from __future__ import annotations

import os


def quiet() -> None:
    """No progress bars, advice or information lines from transformers, datasets and optuna; warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import datasets
    import optuna
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
