"""Inputs and eager, materialized definitions of the losses and of attention, for tests of the fused ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def heads(shape, dtype=torch.float32, *, seed=0, grad=False, scale=1.0):
    """[B, heads, S, d] as models have it: a transposed view of [B, S, heads, d]."""
    batch, count, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype).transpose(1, 2).detach().requires_grad_(grad)


def random_mask(batch, length, kind, seed=0):
    """full, prefix (the last sample empty where there are several), or gaps."""
    if kind == "full":
        return torch.ones(batch, length, dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaps":
        return torch.rand(batch, length, generator=generator) > 0.3
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    if batch > 1:
        lengths[-1] = 0
    return torch.arange(length)[None] < lengths[:, None]


def eager_score_mse(q_s, k_s, q_t, k_t, mask):
    student = q_s @ k_s.mT * q_s.shape[-1] ** -0.5
    teacher = q_t @ k_t.mT * q_t.shape[-1] ** -0.5
    pair = (mask[:, :, None] & mask[:, None, :])[:, None]
    total = torch.where(pair, student - teacher, 0.0).square().sum(dtype=torch.promote_types(q_s.dtype, torch.float32))
    return total / (pair.sum() * q_s.shape[1]).clamp(min=1)


def eager_attention(q, k, v, mask, factors=None):
    """softmax over real keys times v; 0 for samples without any."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask[:, None, None, :], torch.finfo(q.dtype).min)
    p = scores.softmax(-1) * mask.any(-1)[:, None, None, None]
    p = p if factors is None else p * factors.to(p.dtype)
    return p @ torch.where(mask[:, None, :, None], v, 0.0)


def eager_hidden_mse(h_s, weight, bias, h_t, mask):
    total = 0.0
    for student, teacher in zip(h_s, h_t, strict=True):
        difference = (F.linear(student, weight, bias) - teacher)[mask]
        total = total + difference.square().sum(dtype=torch.promote_types(difference.dtype, torch.float32))
    return total / (mask.sum() * weight.shape[0]).clamp(min=1)


def error(value, exact):
    """Distance relative to the size of the exact tensor."""
    norm = exact.norm()
    return ((value.double() - exact).norm() / norm).item() if norm > 0 else value.double().norm().item()


def assert_close_as_eager(values, eager, exact, floor):
    """Each within twice eager's own error of the float64 result, plus a floor."""
    for k, (value, other, reference) in enumerate(zip(values, eager, exact, strict=True)):
        assert torch.isfinite(value).all(), f"result {k} is not finite"
        own, its = error(value, reference), error(other, reference)
        assert own <= 2 * its + floor, f"result {k}: error {own:.2e}, eager's {its:.2e}"
