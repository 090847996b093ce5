"""The last layer for the first token alone, for heads that read nothing else.

A classifier reads one row of the last layer's output, so the other rows need not be computed, nor the layer's keys and
values: with the first token's queries q, weights W_k, W_v and input x,

    q (x W_k')' = (q W_k) x'          softmax(...) (x W_v' + b_v) = (softmax(...) x) W_v' + b_v

The bias of the keys adds the same to all scores of a query, and drops out. Equal to the whole layer but for rounding.
Whoever asks for hidden states, attention probabilities or gradients, hooks or replaces the layer's linear layers, has
another attention function than sdpa, or compiles or exports the model, gets the whole layer (`reads_first`).
docs/decisions/0013 has what it saves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.student.attention import FFNASAttention, is_over_keys
from engine.student.ffn import FFN, FFNPlan, FFNStack
from kernels import readable


def reads_first(layer: nn.Module, mask: Any, plan: FFNPlan | None = None) -> bool:
    """Whether this call may run a layer for the first token alone.

    Args:
        layer: the last one that is not left out, with its `attention` and `all_ffn`.
        mask: as `extended_mask` gives it.
        plan: how it runs; None for all its heads.
    """
    if torch.is_grad_enabled() or layer.training or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    attention = layer.attention
    parts = list(layer.modules())  # whatever is attached to one may look at all rows
    leaves = (m for m in parts[1:] if not isinstance(m, (FFNASAttention, FFNStack, FFN)))
    if not (all(map(readable.is_untouched, parts)) and readable.are_readable(*leaves)):
        return False
    if plan is not None and plan.heads == 0:  # a token's FFNs see no other token
        return True
    if not isinstance(attention, FFNASAttention) or attention.config._attn_implementation != "sdpa":
        return False
    if attention.training or not is_over_keys(mask):
        return False
    linears = (attention.query, attention.key, attention.value)
    return readable.are_tensors(*(m.weight for m in linears))


def attend_first(attention: FFNASAttention, x: Tensor, mask: Tensor | None, heads: int | None = None) -> Tensor:
    """[B, H], the block's output at the first token.

    Args:
        attention: the block, in eval mode.
        x: [B, S, H].
        mask: bool [B or 1, 1, 1, S], True takes part, or None. A sequence without any such token attends to nothing,
            as in `scaled_dot_product_attention`.
        heads: how many run, the leading ones; None for all.
    """
    batch, _, hidden = x.shape
    apart = (-1, attention.head_size, hidden)
    key, (value, bias) = attention.rows(attention.key, heads)[0], attention.rows(attention.value, heads)
    query = attention.queries(x[:, 0], heads).view(batch, -1, attention.head_size).transpose(0, 1)  # [heads, B, d]
    query = (query @ key.view(apart)).transpose(0, 1)  # [B, heads, H]
    # heads as the queries of one head, which attends to the input itself
    tokens = x.to(query.dtype)[:, None]
    seen = F.scaled_dot_product_attention(query[:, None], tokens, tokens, attn_mask=mask, scale=attention.scaling)
    context = (seen[:, 0].transpose(0, 1) @ value.view(apart).transpose(1, 2)).transpose(0, 1)
    if mask is not None:  # the shares of the tokens sum to one, or to nothing
        bias = bias * mask.any(dim=-1).view(-1, 1)
    return attention.project(x[:, 0], (context.reshape(batch, -1) + bias).to(context.dtype), heads)
