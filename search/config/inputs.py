"""Somebody's files, read and checked before a framework is loaded: a mistake is told in a second, not in ten."""

from __future__ import annotations

from engine.data.load import load_task
from engine.data.task_data import TaskData
from engine.model_sources import resolve
from search.config.schema import SearchConfig


def read_inputs(config: SearchConfig) -> TaskData:
    """The task of `config`.

    Raises:
        UserError: anything wrong with its files, or no teacher where the configuration says one is.
    """
    task = load_task(config.data, seed=config.seed)
    resolve(config.teacher)
    return task
