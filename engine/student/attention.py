"""BERT self-attention block: LayerNorm(x + dropout(dense(attention(x)))).

Queries, keys and values [B, heads, S, d] go to the function that `config._attn_implementation` names in transformers'
`AttentionInterface` (sdpa by default). Head sizes may be odd (540 / 12 = 45). In place of sdpa, bfloat16 on a CPU runs
`kernels.fused_attention`. While distilling, a layer is handed its teacher's queries and keys, and `fused_attention`
gives context and score loss from the same tiles (`fuses_score_loss`).

A layer may store fewer heads than the model has (`heads` of its entry in `config.layers`), and a pass may run the
leading ones of those alone, as views of the weights. Queries and keys are returned to the caller, not caught by hooks
(docs/decisions/0005).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_bidirectional_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from kernels import readable
from kernels.attention.linear import fused_linear_norm, fused_linears
from kernels.attention.ops import fused_attention, one_pass_pays

TeacherHeads = tuple[Tensor, Tensor]
"""Queries [B, heads, S, d_t], multiplied by the softmax scale, and keys of the teacher's layer."""


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with the S x S probabilities kept: context [B, S, heads, d] and probabilities [B, heads, S, S]."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


def extended_mask(config: FFNASConfig, x: Tensor, attention_mask: Tensor | None) -> Any:
    """The mask in the form the configured attention function takes.

    Args:
        config: names the attention function.
        x: [B, S, H] embeddings, for dtype and device.
        attention_mask: [B, S] true or 1 at real tokens, a ready 4-d mask, or None.

    Returns:
        For sdpa and for functions without a registered mask of their own a bool [B, 1, 1, S] (True takes part) that
        broadcasts over heads and queries, so that no S x S mask is kept; for eager the same as an additive mask of
        the dtype's lowest value; for other registered functions what transformers builds for them.
    """
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    name = config._attn_implementation
    if name not in ("sdpa", "eager", None) and name in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        return create_bidirectional_mask(config=config, inputs_embeds=x, attention_mask=attention_mask)
    visible = attention_mask.to(device=x.device, dtype=torch.bool)[:, None, None, :]
    if name != "eager":
        return visible
    return torch.zeros_like(visible, dtype=x.dtype).masked_fill(~visible, torch.finfo(x.dtype).min)


def is_fused(config: FFNASConfig, query: Tensor, mask: Any) -> bool:
    """Whether `kernels.fused_attention` takes sdpa's place: bfloat16 on a CPU, with a mask over keys alone."""
    if config._attn_implementation != "sdpa" or query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    return is_over_keys(mask)


def fuses_score_loss(config: FFNASConfig, query: Tensor, mask: Any, teacher: TeacherHeads) -> bool:
    """Whether `kernels.fused_attention` computes context and score loss together.

    It does in place of sdpa, with a mask over keys alone, where that is the faster way (`kernels.attention.ops`). Heads
    that cannot be compared are left to the objective, which names the reason.
    """
    if config._attn_implementation != "sdpa" or teacher[0].shape[:3] != query.shape[:3]:
        return False
    return is_over_keys(mask) and one_pass_pays(query, teacher[0])


def is_over_keys(mask: Any) -> bool:
    """Whether a mask is none, or one bool [B or 1, 1, 1, S] for all heads and queries."""
    return mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))


_FEWEST_TOKENS = {torch.float32: 64, torch.bfloat16: 16}
"""By dtype; below, the fused linear layers save nothing, even with weights that are kept packed."""


def runs_fused(x: Tensor, *layers: nn.Linear) -> bool:
    """Whether `kernels.attention.linear` replaces these layers: readable ones, on a CPU, eagerly, no gradients."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if x.dtype not in _FEWEST_TOKENS or torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():
        return False
    if x.numel() // x.shape[-1] < _FEWEST_TOKENS[x.dtype] or not readable.are_readable(*layers):
        return False
    return all(readable.are_tensors(m.weight, m.bias) and m.weight.dtype == x.dtype for m in layers)


class FFNASAttention(nn.Module):
    """Self-attention, output projection, residual and LayerNorm of one layer.

    Args:
        config: sizes, dropout and attention function.
        layer_idx: for attention functions that ask for it.
        heads: how many to store, at least one; None for all of the model's.
    """

    def __init__(self, config: FFNASConfig, layer_idx: int, heads: int | None = None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads if heads is None else heads
        self.head_size = hidden // config.num_attention_heads
        width = self.num_heads * self.head_size
        self.scaling = self.head_size**-0.5
        self.is_causal = False
        self.p_drop = float(config.attention_probs_dropout_prob)
        self.query = nn.Linear(hidden, width)
        self.key = nn.Linear(hidden, width)
        self.value = nn.Linear(hidden, width)
        self.dense = nn.Linear(width, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        x: Tensor,
        attention_mask: Any,
        teacher: TeacherHeads | None = None,
        parts: int = 1,
        heads: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Output [B, S, H]; queries and keys [B, heads, S, d] (unscaled); probabilities or None; score losses or None.

        Args:
            x: [B, S, H].
            attention_mask: as `extended_mask` gives it.
            teacher: what to compare scores with; the losses are None where it was left alone (`fuses_score_loss`).
            parts: how many batches x is made of, one after the other; `teacher` is that of each. The score losses
                are [parts].
            heads: how many run, the leading ones; None for all.
            **kwargs: for the attention function.
        """
        split = (*x.shape[:-1], self.num_heads if heads is None else heads, self.head_size)
        query, key, value = (t.view(split).transpose(1, 2) for t in self._projected(x, heads))
        p_drop = self.p_drop if self.training else 0.0
        if teacher is not None and fuses_score_loss(self.config, query[: len(x) // parts], attention_mask, teacher):
            each = zip(*(t.chunk(parts) for t in (query, key, value, _keys(attention_mask, x))), strict=True)
            done = [
                fused_attention(q, k, v, mask, scale=self.scaling, p_drop=p_drop, teacher=teacher, scale_t=1.0)
                for q, k, v, mask in each
            ]
            contexts = [context.transpose(1, 2) for context, _ in done]
            context = contexts[0] if parts == 1 else torch.cat(contexts)
            losses = torch.stack([loss for _, loss in done if loss is not None])
            return self.project(x, context, heads), query, key, None, losses
        if is_fused(self.config, query, attention_mask):
            mask = _keys(attention_mask, x)
            context, _ = fused_attention(query, key, value, mask, scale=self.scaling, p_drop=p_drop)
            return self.project(x, context.transpose(1, 2), heads), query, key, None, None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, probabilities = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=p_drop,
            scaling=self.scaling,
            **kwargs,
        )
        return self.project(x, context, heads), query, key, probabilities, None

    def project(self, x: Tensor, context: Tensor, heads: int | None = None) -> Tensor:
        """LayerNorm(x + dropout(dense(context))), x [..., H], context [..., heads d] with any split of the heads."""
        dense, norm = self.dense, self.layernorm
        width = self.head_size * (self.num_heads if heads is None else heads)
        context = context.reshape(*x.shape[:-1], width)
        weight = dense.weight if heads is None else self._plain(dense, heads).weight[:, :width]
        dropped = self.training and self.dropout.p > 0
        if not dropped and readable.are_readable(norm, self.dropout) and runs_fused(x, dense):
            return fused_linear_norm(context, weight, dense.bias, x, norm.weight, norm.bias, eps=norm.eps)
        projected = dense(context) if heads is None else nn.functional.linear(context, weight, dense.bias)
        return norm(x + self.dropout(projected))

    def rows(self, layer: nn.Linear, heads: int | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of `query`, `key` or `value` for the leading heads, as views; None for all.

        Raises:
            UserError: there are fewer heads, or there is more to the layer than its weights.
        """
        if heads is None:
            return layer.weight, layer.bias
        plain, width = self._plain(layer, heads), heads * self.head_size
        return plain.weight[:width], plain.bias[:width]

    def queries(self, x: Tensor, heads: int | None) -> Tensor:
        """[..., H] to the queries [..., heads d] of the leading heads."""
        return self.query(x) if heads is None else nn.functional.linear(x, *self.rows(self.query, heads))

    def _projected(self, x: Tensor, heads: int | None) -> list[Tensor]:
        """Queries, keys and values, [..., heads d] each."""
        layers = (self.query, self.key, self.value)
        if runs_fused(x, *layers):
            weights, biases = zip(*(self.rows(m, heads) for m in layers), strict=True)
            return fused_linears(x, weights, biases)
        if heads is None:
            return [m(x) for m in layers]
        return [nn.functional.linear(x, *self.rows(m, heads)) for m in layers]

    def _plain(self, layer: nn.Linear, heads: int) -> nn.Linear:
        if not readable.are_readable(layer, everywhere=False):
            raise UserError(
                f"heads: {heads} of {self.num_heads} heads can be run in plain linear layers without hooks alone, not"
                f" in this {type(layer).__name__}; extract the architecture into a model of its own"
            )
        if not 1 <= heads <= self.num_heads:
            raise UserError(f"heads: the layer stores {self.num_heads}, {heads} were asked for; use 1 to that many")
        return layer


def _keys(mask: Tensor | None, x: Tensor) -> Tensor:
    """bool [B, S], True at real tokens, from [B or 1, 1, 1, S] or nothing."""
    shape = x.shape[:2]
    return x.new_ones(shape, dtype=torch.bool) if mask is None else mask[:, 0, 0].expand(shape)
