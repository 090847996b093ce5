"""Data of the engine: tasks, text, splits, and the packed token arrays training reads.

Names are resolved on first use (PEP 562): what reads and checks files loads no framework, so that a mistake in them is
told at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data.batching import Batch, collate, plan_batches
    from engine.data.config import DataConfig
    from engine.data.dataset import EncodedDataset
    from engine.data.encode import encode_task
    from engine.data.load import load_task
    from engine.data.rows import Rows
    from engine.data.task import TaskSpec
    from engine.data.task_data import EncodedTask, TaskData
    from engine.data.text import encode_text
    from engine.data.tokenizing import check_max_length, model_positions

_EXPORTS = {
    "Batch": "engine.data.batching",
    "DataConfig": "engine.data.config",
    "EncodedDataset": "engine.data.dataset",
    "EncodedTask": "engine.data.task_data",
    "Rows": "engine.data.rows",
    "TaskData": "engine.data.task_data",
    "TaskSpec": "engine.data.task",
    "check_max_length": "engine.data.tokenizing",
    "collate": "engine.data.batching",
    "encode_task": "engine.data.encode",
    "encode_text": "engine.data.text",
    "load_task": "engine.data.load",
    "model_positions": "engine.data.tokenizing",
    "plan_batches": "engine.data.batching",
}

__all__ = [
    "Batch",
    "DataConfig",
    "EncodedDataset",
    "EncodedTask",
    "Rows",
    "TaskData",
    "TaskSpec",
    "check_max_length",
    "collate",
    "encode_task",
    "encode_text",
    "load_task",
    "model_positions",
    "plan_batches",
]


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'engine.data' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
