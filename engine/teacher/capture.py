"""Queries and keys of a transformers encoder, taken where its attention is dispatched.

transformers' models hand queries, keys and values [B, heads, S, d] to a function chosen by name (`AttentionInterface`).
Ours, `ffnas_capture`, notes queries and keys for the recorder that is active, then calls the library's own sdpa
attention: outputs are those of sdpa, and no S×S is made. In bfloat16 on a CPU `kernels.fused_attention` takes its
place.

Layers are counted in the order their attention runs, which is right for models without layer numbers (DistilBERT) and
where one module serves several layers (ALBERT). Other ways: docs/decisions/0005.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, sdpa_mask

from engine.errors import UserError
from kernels.attention.ops import fused_attention
from kernels.dispatch import has_kernels

CAPTURE = "ffnas_capture"
"""Name of the attention function, as in `model.set_attn_implementation(CAPTURE)`."""


@dataclass
class Recorder:
    """Queries and keys of the wanted attention calls of one forward pass.

    Attributes:
        wanted: 0-based layers.
        calls: attention calls so far.
        queries: layer -> [B, heads, S, d], multiplied by the softmax scale.
        keys: layer -> [B, heads, S, d].
    """

    wanted: frozenset[int]
    calls: int = 0
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)

    def record(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float | None, extra: dict) -> None:
        layer, self.calls = self.calls, self.calls + 1
        if getattr(module, "is_causal", False):
            raise UserError("teacher: its attention is causal: only bidirectional encoders can teach")
        if query.shape != key.shape:
            raise UserError(
                f"teacher: queries {tuple(query.shape)} and keys {tuple(key.shape)} differ (grouped or cross "
                "attention): only encoders with one key per query head can teach"
            )
        if extra.get("position_bias") is not None or extra.get("softcap") is not None:
            raise UserError("teacher: its attention scores are more than queries times keys (position bias or cap)")
        if layer in self.wanted:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            self.queries[layer] = query * scale
            self.keys[layer] = key


_active: ContextVar[Recorder | None] = ContextVar("ffnas_capture_recorder", default=None)


@contextmanager
def recording(layers: Sequence[int]) -> Iterator[Recorder]:
    """Record queries and keys of `layers` in the forward passes of this context (one pass per context)."""
    recorder = Recorder(frozenset(layers))
    token = _active.set(recorder)
    try:
        yield recorder
    finally:
        _active.reset(token)


def capture_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa attention that shows queries and keys to the active recorder; same arguments and result as sdpa's."""
    recorder = _active.get()
    if recorder is not None:
        recorder.record(module, query, key, scaling, kwargs)
    keys = _visible_keys(attention_mask)
    if keys is not None and _runs_fused(query, key, value, dropout):
        context, _ = fused_attention(query, key, value, keys, scale=scaling)
        return context.transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def capture_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """sdpa's mask, always made: deciding that nothing is padded would read the mask on the host."""
    padding, queries = kwargs.get("attention_mask"), kwargs.get("q_length")
    plain = kwargs.get("mask_function") is bidirectional_mask_function and not kwargs.get("use_vmap")
    shape = (kwargs.get("batch_size"), kwargs.get("kv_length"))
    if not args and plain and queries == shape[1] and padding is not None and padding.shape == shape:
        return padding.bool()[:, None, None, :].expand(-1, 1, queries, -1)
    return sdpa_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


def _visible_keys(mask: Tensor | None) -> Tensor | None:
    """bool [B, S] of a mask that is the same for all heads and queries by its strides, else None."""
    if mask is None or mask.dtype != torch.bool or mask.shape[1] != 1 or mask.stride(2) != 0:
        return None
    return mask[:, 0, 0]


def _runs_fused(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    if query.device.type != "cpu" or query.dtype != torch.bfloat16 or torch.is_grad_enabled() or dropout:
        return False
    return query.shape == key.shape == value.shape and has_kernels(query, key, value)


AttentionInterface.register(CAPTURE, capture_attention)
AttentionMaskInterface.register(CAPTURE, capture_mask)
