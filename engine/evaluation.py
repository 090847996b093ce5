"""Evaluation of a model, or of one subnet of a supernet, over a whole split."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from engine.architecture import Architecture
from engine.data import Batch, EncodedDataset, TaskSpec
from engine.distill import autocast
from engine.metrics import compute_metrics


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
        model: a sequence-classification model; put into eval mode and left there.
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
    model.eval()
    device = next(model.parameters()).device
    extra = {} if architecture is None else {"architecture": architecture}
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters  # DistilBERT takes none
    logits, labels = [], []
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            types = {"token_type_ids": batch.token_type_ids} if takes_types else {}
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **types, **extra)
        logits.append(output.logits.float().cpu())
        labels.append(batch.labels.cpu())
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def evaluate(
    model: nn.Module,
    data: EncodedDataset,
    spec: TaskSpec,
    *,
    batch_size: int = 256,
    precision: str = "fp32",
    architecture: Architecture | None = None,
) -> dict[str, float]:
    """Every metric of the task over the whole of `data`."""
    logits, labels = predict(model, data, batch_size=batch_size, precision=precision, architecture=architecture)
    return compute_metrics(spec, logits, labels)
