"""Evaluation of a model, or of one subnet of a supernet, over a whole split, whatever the kind of task.

Heads are told apart by what they put out: logits of classes, values or choices, or start and end scores.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import nn

from engine.architecture.architecture import Architecture
from engine.autocast import autocast
from engine.data import Batch, EncodedDataset, EncodedTask, TaskSpec, plan_batches
from engine.evaluation.answers import Answer, AnswerCollector, answer_metrics, answer_scores, best_threshold
from engine.evaluation.metrics import compute_metrics, primary
from engine.states import answers

SPAN_BATCH = 64
"""Most windows of question answering per forward pass: they are long."""


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
    plan = plan_batches(data.lengths, batch_size=batch_size, shuffle=False)
    batches = (data.collate(rows) for rows in plan)
    logits = torch.cat([answer for _, answer in run_batches(model, batches, precision=precision)]).numpy()
    ordered = np.empty_like(logits)
    ordered[np.concatenate(plan)] = logits
    return ordered


def predict_answers(
    model: nn.Module,
    data: EncodedDataset,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> list[Answer]:
    """One answer per question of `data`, whose windows need no labels."""
    collector = AnswerCollector(data)
    plan = plan_batches(data.lengths, batch_size=batch_size, shuffle=False)
    batches = (data.collate(rows) for rows in plan)
    found = run_batches(model, batches, precision=precision, architecture=architecture)
    for rows, (_, logits) in zip(plan, found, strict=True):
        collector.add(rows, logits)
    return collector.answers()


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
        threshold: question answering: see `engine.evaluation.answers.Answer.at`.
    """
    if spec.is_span:
        size = min(batch_size, SPAN_BATCH)
        found = predict_answers(model, data, batch_size=size, precision=precision, architecture=architecture)
        golds = data.spans.questions.golds
        return answer_metrics(found, golds, no_answer=spec.no_answer, threshold=threshold)
    batch_size = max(1, batch_size // data.choices)
    logits, labels = predict(model, data, batch_size=batch_size, precision=precision, architecture=architecture)
    return compute_metrics(spec, logits, labels)


def evaluate_dev(
    model: nn.Module,
    data: EncodedTask,
    *,
    precision: str = "fp32",
    keep: Callable[[np.ndarray], None] | None = None,
) -> dict[str, float]:
    """Metrics of the reported splits: all of `dev`, and the ranking one of each further split, as METRIC_SPLIT.

    Where a question may have no answer, the threshold for saying so is chosen on `select`, never on `dev`.

    Args:
        model: with the task's head.
        data: the task.
        precision: `"fp32"` or `"bf16"` (autocast).
        keep: called with what was measured on `dev`, float32, a row per row of `dev` in its order: logits [N, C], or of
            question answering exact match and F1 [N, 2].
    """
    spec = data.spec
    threshold = 0.0
    if spec.no_answer:
        threshold = best_threshold(
            predict_answers(model, data.select, precision=precision), data.select.spans.questions.golds
        )
    metrics, rows = _measured(model, data.dev, spec, precision, threshold, with_rows=keep is not None)
    if keep is not None:
        keep(rows)
    for name, split in data.further.items():
        metric, value = primary(spec, evaluate(model, split, spec, precision=precision))
        metrics[f"{metric}_{name.removeprefix('dev_')}"] = value
    return metrics


def _measured(
    model: nn.Module, data: EncodedDataset, spec: TaskSpec, precision: str, threshold: float, *, with_rows: bool
) -> tuple[dict[str, float], np.ndarray]:
    """Metrics of a whole split, and where wanted what `evaluate_dev` keeps."""
    if spec.is_span:
        found = predict_answers(model, data, batch_size=SPAN_BATCH, precision=precision)
        golds = data.spans.questions.golds
        metrics = answer_metrics(found, golds, no_answer=spec.no_answer, threshold=threshold)
        scores = answer_scores(found, golds, no_answer=spec.no_answer, threshold=threshold) if with_rows else _NO_ROWS
        return metrics, scores
    batch_size = max(1, 256 // data.choices)
    logits, labels = predict(model, data, batch_size=batch_size, precision=precision)
    rows = np.empty_like(logits)
    rows[np.concatenate(plan_batches(data.lengths, batch_size=batch_size, shuffle=False))] = logits
    return compute_metrics(spec, logits, labels), rows


_NO_ROWS = np.empty((0, 2), dtype=np.float32)
