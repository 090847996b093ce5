"""Batches of several tasks, one task a step.

An epoch is one pass over every task: each of its batches comes once, in an order of tasks that (seed, epoch) decide, so
a large task gets as many steps as it has batches. Any step of any epoch can be reached without reading those before it.

Rejected: drawing tasks in proportion to a power of their size. It is one more setting, and an epoch of it is no pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.data.batching import Batch
from engine.data.config import DataConfig
from engine.data.dataset import EncodedDataset
from engine.data.load import load_task
from engine.data.task_data import EncodedTask


@dataclass(frozen=True, eq=False)
class TaskMixture:
    """Several data sets as one; the part of `EncodedDataset` that training phases use.

    Attributes:
        parts: data set of each task; the task's name is on every batch (`Batch.task`).
    """

    parts: Mapping[str, EncodedDataset]

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def num_batches(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return sum(part.num_batches(batch_size) for part in self.parts.values())

    def batches(self, batch_size: int, *, seed: int = 0, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from step `start_step` on."""
        names = list(self.parts)
        counts = [part.num_batches(batch_size) for part in self.parts.values()]
        order = np.random.default_rng([seed, epoch]).permutation(np.repeat(np.arange(len(names)), counts))
        before = np.bincount(order[:start_step], minlength=len(names)).tolist()
        streams = [
            part.batches(batch_size, seed=seed, epoch=epoch, start_step=skipped)
            for part, skipped in zip(self.parts.values(), before, strict=True)
        ]
        for task in order[start_step:].tolist():
            yield replace(next(streams[task]), task=names[task])

    def subset(self, count: int, seed: int = 0) -> TaskMixture:
        """About `count` rows, the same share of each task."""
        share = count / len(self)
        return TaskMixture({n: p.subset(max(1, round(share * len(p))), seed) for n, p in self.parts.items()})

    def first(self, count: int) -> TaskMixture:
        """About the first `count` rows, the same share of each task."""
        share = count / len(self)
        return TaskMixture({n: p.first(max(1, round(share * len(p)))) for n, p in self.parts.items()})

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the batches."""
        return hashlib.sha256(repr([(n, p.fingerprint()) for n, p in self.parts.items()]).encode()).hexdigest()


def other_tasks(
    config: DataConfig, tokenizer: Any, max_positions: int | None, seed: int, *, published: bool = False
) -> dict[str, EncodedTask]:
    """The tasks of `data.tasks`, split like the main one and encoded (see `encode_task`); without text.

    Raises:
        UserError: one cannot be read.
    """
    tasks = {}
    for name in config.tasks or ():
        own = replace(config, task=name, tasks=None, train=None, dev=None, text=None, kind="auto", metric="auto")
        data = load_task(own, seed=seed)
        data = replace(data, text=data.text[:1], text_sources=())
        tasks[name] = data.encode(tokenizer, config.max_length, max_positions=max_positions, published=published)
    return tasks
