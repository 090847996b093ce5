"""Evaluation of a model, or of one subnet of a supernet, over a whole split, whatever the kind of task.

Here models run; what outputs mean and how good they are is the kind of task's to say (`engine.data.task.TaskHead`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from engine.architecture.architecture import Architecture
from engine.autocast import autocast
from engine.data import Batch, EncodedDataset, EncodedTask, TaskSpec, plan_batches
from engine.data.results import Found
from engine.evaluation.metrics import primary
from engine.states import answers


def predict(
    model: nn.Module,
    data: EncodedDataset,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, num_labels]` (float32) and labels `[N]` over `data`, in one common, length-sorted order.

    Args:
        model: with a head for classes, values or choices; put into eval mode and left there.
        data: encoded examples with labels.
        batch_size: sequences per forward pass.
        precision: `"fp32"` or `"bf16"` (autocast).
        architecture: evaluate this subnet of a supernet instead of the whole model.
    """
    batches = data.batches(batch_size, seed=0, epoch=0, shuffle=False, bucket=True)
    return predict_batches(model, batches, precision=precision, architecture=architecture)


@torch.no_grad()
def predict_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`predict` over given batches, in their order."""
    logits, labels = [], []
    for batch, answer in run_batches(model, batches, precision=precision, architecture=architecture):
        logits.append(answer)
        assert batch.labels is not None
        labels.append(batch.labels.cpu())
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def predict_rows(
    model: nn.Module,
    data: EncodedDataset,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
) -> np.ndarray:
    """Logits `[N, num_labels]` (float32) in the order of the rows of `data`, which needs no labels."""
    found = list(run_rows(model, data, batch_size=batch_size, precision=precision))
    logits = torch.cat([outputs for _, outputs in found]).numpy()
    ordered = np.empty_like(logits)
    ordered[np.concatenate([rows for rows, _ in found])] = logits
    return ordered


def run_rows(
    model: nn.Module,
    data: EncodedDataset,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> Found:
    """Rows of `data`, which needs no labels, with the model's outputs, batch by batch, shortest first."""
    plan = plan_batches(data.lengths, batch_size=batch_size, shuffle=False)
    batches = (data.collate(rows) for rows in plan)
    found = run_batches(model, batches, precision=precision, architecture=architecture)
    return ((rows, outputs) for rows, (_, outputs) in zip(plan, found, strict=True))


def answers_of(
    model: nn.Module,
    data: EncodedDataset,
    spec: TaskSpec,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> Any:
    """Answers to the rows of `data`, which needs no labels, as `TaskHead.answer` makes them."""
    size = max(1, min(batch_size, spec.head.most_rows or batch_size) // data.choices)
    found = run_rows(model, data, batch_size=size, precision=precision, architecture=architecture)
    return spec.head.answer(spec, data, found)


@torch.no_grad()
def run_batches(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Each batch with the model's answer on the CPU: logits, or start and end scores [B, S, 2], float32."""
    model.eval()
    device = next(model.parameters()).device
    extra = {} if architecture is None else {"architecture": architecture}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters  # DistilBERT takes none
    for batch in batches:
        moved = batch.to(device)
        with autocast(device, precision):
            types = {"token_type_ids": moved.token_type_ids} if takes_types else {}
            output = model(
                input_ids=moved.input_ids, attention_mask=moved.attention_mask, return_dict=True, **types, **extra
            )
        yield batch, answers(output).float().cpu()


def evaluate(
    model: nn.Module,
    data: EncodedDataset,
    spec: TaskSpec,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    architecture: Architecture | None = None,
    threshold: float = 0.0,
) -> dict[str, float]:
    """Every metric of the task over the whole of `data`.

    Args:
        model: with the task's head.
        data: encoded examples with labels or answers.
        spec: the task.
        batch_size: sequences per forward pass.
        precision: `"fp32"` or `"bf16"` (autocast).
        architecture: evaluate this subnet of a supernet instead of the whole model.
        threshold: see `TaskHead.threshold`.
    """
    answers = answers_of(model, data, spec, batch_size=batch_size, precision=precision, architecture=architecture)
    return spec.head.score(spec, answers, spec.head.gold_of(data), threshold=threshold).metrics


def evaluate_dev(
    model: nn.Module,
    data: EncodedTask,
    *,
    precision: str = "fp32",
    keep: Callable[[np.ndarray], None] | None = None,
) -> dict[str, float]:
    """Metrics of the reported splits: all of `dev`, and the ranking one of each further split, as METRIC_SPLIT.

    A threshold (for "no answer", of questions that may have none) is chosen on `select`, never on `dev`.

    Args:
        model: with the task's head.
        data: the task.
        precision: `"fp32"` or `"bf16"` (autocast).
        keep: called with what is kept of each row of `dev` (`engine.data.results.Measured.rows`).
    """
    spec, head = data.spec, data.spec.head
    threshold = head.threshold(
        spec, lambda: answers_of(model, data.select, spec, precision=precision), head.gold_of(data.select)
    )
    answers = answers_of(model, data.dev, spec, precision=precision)
    measured = head.score(spec, answers, head.gold_of(data.dev), threshold=threshold)
    if keep is not None:
        keep(measured.rows())
    metrics = dict(measured.metrics)
    for name, split in data.further.items():
        metric, value = primary(spec, evaluate(model, split, spec, precision=precision))
        metrics[f"{metric}_{name.removeprefix('dev_')}"] = value
    return metrics
