"""Attention and the score loss in plain PyTorch, forward and backward: the reference of the fused kernels.

    s = scale q kᵀ over real keys,  P = softmax(s),  context = dropout(P) v
    loss = mean over heads and real pairs of (s - scale_t q_t k_tᵀ)²

Shapes: q, k, v [B, heads, S, d]; q_t, k_t [B, heads, S, d_t]; mask [B, S] bool; context [B, S, heads, d] in q's dtype;
lse [B, heads, S], the logarithm of the softmax's denominator. Samples without real keys get context 0 and lse 0.

Blocks of query rows are taken one after the other, and computed again in backward, so that no S×S is kept here either.
Rejected: autograd through `scaled_dot_product_attention`; its dropout is not Philox's, and it does not show the scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.reference.losses import autocast_off, gradient_like, widest
from kernels.reference.philox import dropout_mask

_ROWS = 128
"""Query rows at a time."""


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p_drop: float, seed: Tensor | None,
    q_t: Tensor | None, k_t: Tensor | None, scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """context, lse, loss (0 without a teacher)."""
    with autocast_off(q):
        block = _Blocks(q, k, v, mask, scale, p_drop, seed, q_t, k_t, scale_t)
        context, lse, total = [], [], block.q.new_zeros(())
        for rows, scores in block.scores():
            some = torch.logsumexp(scores, -1)
            some = torch.where(block.any_key, some, 0.0)
            p = torch.where(block.any_key[..., None], (scores - some[..., None]).exp(), 0.0)
            context.append((p * block.factors(rows)) @ block.v)
            lse.append(some)
            if q_t is not None:
                total = total + block.difference(rows).square().sum()
        empty = q.shape[2] == 0
        joined = block.q if empty else torch.cat(context, 2)
        loss = total / block.pairs
        return joined.transpose(1, 2).contiguous().to(q.dtype), torch.cat(lse, 2) if lse else block.q[..., 0], loss


def backward(
    grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Tensor,
    lse: Tensor, scale: float, p_drop: float, seed: Tensor | None, q_t: Tensor | None, k_t: Tensor | None,
    scale_t: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, in their dtypes and layouts."""
    with autocast_off(q):
        block = _Blocks(q, k, v, mask, scale, p_drop, seed, q_t, k_t, scale_t)
        upstream, output = (x.to(block.q.dtype).transpose(1, 2) for x in (grad_context, context))
        delta = (upstream * output).sum(-1)
        grad_q, grad_k, grad_v = torch.zeros_like(block.q), torch.zeros_like(block.k), torch.zeros_like(block.v)
        for rows, scores in block.scores():
            p = torch.where(block.any_key[..., None], (scores - lse[:, :, rows, None]).exp(), 0.0)
            factors = block.factors(rows)
            grad_p = (upstream[:, :, rows] @ block.v.mT) * factors
            grad_s = p * (grad_p - delta[:, :, rows, None])
            if q_t is not None:
                grad_s = grad_s + block.difference(rows) * (2.0 * grad_loss / block.pairs)
            grad_q[:, :, rows] = grad_s @ block.k * scale
            grad_k += grad_s.mT @ block.q[:, :, rows] * scale
            grad_v += (p * factors).mT @ upstream[:, :, rows]
        keys = mask[:, None, :, None]
        results = (grad_q, torch.where(keys, grad_k, 0.0), torch.where(keys, grad_v, 0.0))
        return tuple(gradient_like(x).copy_(g) for x, g in zip((q, k, v), results, strict=True))  # type: ignore[return-value]


class _Blocks:
    """What forward and backward share: operands in wide precision, padded keys as 0."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p_drop: float, seed: Tensor | None,
        q_t: Tensor | None, k_t: Tensor | None, scale_t: float,
    ) -> None:  # fmt: skip
        self.real = mask[:, None, :, None]
        dtype = widest(q, k, v, *(t for t in (q_t, k_t) if t is not None))
        self.q = q.to(dtype)
        self.k, self.v = (torch.where(self.real, x.to(dtype), 0.0) for x in (k, v))
        self.any_key = mask.any(-1)[:, None, None]
        self.visible = mask[:, None, None, :]
        self.scale, self.scale_t = scale, scale_t
        self.dropout = (p_drop, seed)
        self.pairs = (mask.sum(-1).square().sum() * q.shape[1]).clamp(min=1).to(self.q.dtype)
        if q_t is not None and k_t is not None:
            self.q_t, self.k_t = (torch.where(self.real, x.to(dtype), 0.0) for x in (q_t, k_t))

    def scores(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows with their scaled scores, -inf at padded keys."""
        for begin in range(0, self.q.shape[2], _ROWS):
            rows = slice(begin, begin + _ROWS)
            yield rows, (self.q[:, :, rows] @ self.k.mT * self.scale).masked_fill(~self.visible, float("-inf"))

    def difference(self, rows: slice) -> Tensor:
        """Scores minus the teacher's at real pairs, 0 elsewhere."""
        own = torch.where(self.real[:, :, rows], self.q[:, :, rows], 0.0) @ self.k.mT * self.scale
        return own - self.q_t[:, :, rows] @ self.k_t.mT * self.scale_t

    def factors(self, rows: slice) -> Tensor | float:
        """0 or 1 / (1 - p) per probability of these rows."""
        p, seed = self.dropout
        if p == 0.0:
            return 1.0
        assert seed is not None
        batch, heads, length, _ = self.q.shape
        kept = dropout_mask(torch.Size((batch, heads, length, length)), p, int(seed), device=self.q.device)
        scale = 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
        return kept[:, :, rows].to(self.q.dtype) * scale
