"""The published distillation objective on the outputs of `paper_student` models, and its optimizer and schedule."""

from __future__ import annotations

import torch
from torch import nn

FORGOTTEN = -100.0
"""Attention scores up to here count as 0 on both sides."""


def soft_cross_entropy(student, teacher, temperature=1.0):
    """-p log q per class, without a mean."""
    return -(teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)


def squared(a, b):
    return ((a - b) ** 2).mean()


def kept(scores):
    return torch.where(scores > FORGOTTEN, scores, torch.zeros_like(scores))


def hidden_loss(student, teacher, layers):
    """Embeddings and layer outputs; `layers` are the teacher's that the student's match. All positions count."""
    pairs = [(0, 0), *((own + 1, wanted + 1) for own, wanted in enumerate(layers))]
    return sum(squared(student.hidden[own], teacher.hidden[wanted]) for own, wanted in pairs)


def attention_loss(student, teacher, layers):
    pairs = enumerate(layers)
    return sum(squared(kept(student.scores[own]), kept(teacher.scores[wanted])) for own, wanted in pairs)


def prediction_loss(student, teacher, kind, padding, labels=None, temperature=1.0):
    """Classes and choices: mean over rows and classes. Spans: both sides summed, then the mean over rows and positions,
    padding and the first position masked. Regression: against the labels."""
    if kind == "regression":
        return squared(student.logits[:, 0], labels)
    if kind != "spans":
        return soft_cross_entropy(student.logits, teacher.logits, temperature).mean()
    barred = padding.clone()
    barred[:, 0] = 1
    sides = []
    for side in range(2):
        own, wanted = (outputs.logits[..., side] - 10000.0 * barred for outputs in (student, teacher))
        sides.append(soft_cross_entropy(own, wanted, temperature))
    return (sides[0] + sides[1]).mean()


def published_rates(total, ratio=0.1):
    """Factor of the learning rate at every step: k/w for the first w = int(ratio total), then down to 0."""
    warm = int(ratio * total)
    return [k / warm if k < warm else (total - k) / max(1, total - warm) for k in range(total)]


def published_optimizer(model, lr, weight_decay=0.01):
    """AdamW; biases and norms are not decayed."""
    norms = [p for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()]
    free = {id(p) for p in norms} | {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    decayed = [p for p in model.parameters() if id(p) not in free]
    others = [p for p in model.parameters() if id(p) in free]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr)


def train(model, batches, loss, lr, rates, clip=1.0):
    """One optimizer step for each of `batches`, at `lr` times the next of `rates`."""
    optimizer = published_optimizer(model, lr)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * rates[step]
        optimizer.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
