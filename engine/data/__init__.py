"""Data of the engine: tasks, text, splits, and the packed token arrays training reads."""

from engine.data.batching import Batch, collate, plan_batches
from engine.data.config import DataConfig
from engine.data.dataset import EncodedDataset
from engine.data.encode import encode_task
from engine.data.load import load_task
from engine.data.task import Rows, TaskSpec
from engine.data.task_data import EncodedTask, TaskData
from engine.data.text import encode_text
from engine.data.tokenizing import check_max_length, model_positions

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
