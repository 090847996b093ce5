"""What the trials of a run depend on, so that workers which would train differently are told apart.

Settings that cannot change a score are left out: places, devices, threads, caches, everything that comes after the
search. Data and teacher count by content, not by path: workers may find them in different places. The weights
candidates start from count bit by bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import nn

from engine.data import EncodedTask
from engine.latency.table import LatencyTable
from search.config.schema import SearchConfig

IRRELEVANT = (
    *("preset", "runs", "name", "device", "threads", "ledger", "tracker", "checkpoint_every"),
    *("teacher", "data", "targets", "derive", "baselines", "report", "files"),
)
"""Sections and fields of the configuration on which no trial depends, or that are compared by content."""


def facts(
    config: SearchConfig, data: EncodedTask, teacher: nn.Module, model: nn.Module, table: LatencyTable | None = None
) -> dict[str, Any]:
    """What trials that start from `model` depend on, by name: JSON values, settings first.

    Args:
        config: resolved (precision decided).
        data: the encoded splits.
        teacher: fine-tuned.
        model: the supernet.
        table: the latency table that decides what is within limits, if any.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in IRRELEVANT}
    found = dict(_flat("", settings))
    for split in ("train", "score", "text"):
        found[f"data.{split}"] = getattr(data, split).fingerprint()[:16]
    found.pop("objectives.latency_table", None)  # a place; its content counts
    if table is not None:
        found["objectives.latency_table"] = hashlib.sha256(repr(table).encode()).hexdigest()[:16]
    found |= {"weights.teacher": weights_hash(teacher), "weights.supernet": weights_hash(model)}
    return json.loads(json.dumps(found))  # as a database gives it back


def weights_hash(model: nn.Module) -> str:
    """16 hexadecimal digits that differ if any parameter or buffer does, in name or value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _flat(prefix: str, values: dict[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        flat += _flat(f"{prefix}{name}.", value) if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return flat
