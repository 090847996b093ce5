# SPDX-License-Identifier: Apache-2.0
"""An ffnas encoder in plain PyTorch: BERT with searched feed-forward networks. Needs torch and transformers only.

A layer is BERT's self-attention block, with all heads or some, followed by a stack of FFNs, each
`LayerNorm(x + dropout(body(x)))` with the body of `expressions_ffnas.py`; it may lack either. Shapes: B sequences, S
tokens, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from .configuration_ffnas import FFNASConfig
from .expressions_ffnas import BODIES, FACTORED
from .pooling_ffnas import Pooler

IGNORED_LABEL = -100


class FFNASEmbeddings(nn.Module):
    """Tokens (trigram: with their neighbours), positions and segments; [B, S] ids to [B, S, H]."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        self.trigram = config.embedding_type == "trigram"
        full = config.embedding_type == "full"
        width = config.hidden_size if full else config.embedding_size
        self.token_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.segment_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.dense = None if full else nn.Linear(3 * width if self.trigram else width, config.hidden_size)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if self.trigram:  # next, current and previous token, zeros past both ends
            following = F.pad(tokens[:, 1:], (0, 0, 0, 1))
            previous = F.pad(tokens[:, :-1], (0, 0, 1, 0))
            tokens = torch.cat([following, tokens, previous], dim=-1)
        if self.dense is not None:
            tokens = self.dense(tokens)
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = tokens + self.position_embeddings(position_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, 1, dtype=torch.long, device=tokens.device)
        x = x + self.segment_embeddings(token_type_ids)
        return self.dropout(self.layernorm(x))


class FFNASAttention(nn.Module):
    """Self-attention with `heads` heads, output projection, residual and LayerNorm."""

    def __init__(self, config: FFNASConfig, heads: int) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.heads = heads
        self.head_size = hidden // config.num_attention_heads
        width = heads * self.head_size
        self.p_drop = config.attention_probs_dropout_prob
        self.query = nn.Linear(hidden, width)
        self.key = nn.Linear(hidden, width)
        self.value = nn.Linear(hidden, width)
        self.dense = nn.Linear(width, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor | None, keep_probabilities: bool) -> tuple[Tensor, Tensor | None]:
        """[B, S, H] and, if wanted, the attention probabilities [B, heads, S, S]; `mask` bool [B, 1, 1, S] or None."""
        batch, length, _ = x.shape
        split = (batch, length, self.heads, self.head_size)
        query, key, value = (part(x).view(split).transpose(1, 2) for part in (self.query, self.key, self.value))
        p_drop = self.p_drop if self.training else 0.0
        probabilities = None
        if keep_probabilities:
            scores = query @ key.transpose(2, 3) * self.head_size**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            probabilities = scores.softmax(dim=-1)
            context = F.dropout(probabilities, p_drop) @ value
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p_drop)
        context = context.transpose(1, 2).reshape(batch, length, self.heads * self.head_size)
        return self.layernorm(x + self.dropout(self.dense(context))), probabilities


class KronLinear(nn.Module):
    """A linear layer whose weight is the Kronecker product of `a` and `b`: two small products instead of one."""

    def __init__(self, rows: int, columns: int, small: tuple[int, int]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rows // small[0], columns // small[1]))
        self.b = nn.Parameter(torch.empty(small))
        self.bias = nn.Parameter(torch.empty(rows))

    def forward(self, x: Tensor) -> Tensor:
        split = x.unflatten(-1, (self.a.shape[1], self.b.shape[1]))
        return (self.a @ (split @ self.b.T)).flatten(-2) + self.bias


class FFN(nn.Module):
    """LayerNorm(x + dropout(body(x))); the body uses two linear layers, to the inner width and back."""

    def __init__(self, config: FFNASConfig, body: Callable[..., Tensor], inner: int, factored: list) -> None:
        super().__init__()
        self.body = body
        hidden, (p, q) = config.hidden_size, config.kron_block or (1, 1)
        self.dense1 = KronLinear(inner, hidden, (p, q)) if "dense1" in factored else nn.Linear(hidden, inner)
        self.dense2 = KronLinear(hidden, inner, (q, p)) if "dense2" in factored else nn.Linear(inner, hidden)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.layernorm(x + self.dropout(self.body(x, self.dense1, self.dense2)))


class FFNASLayer(nn.Module):
    """An attention block (None without heads) and its stack of FFNs."""

    def __init__(self, config: FFNASConfig, layer: dict, body: Callable[..., Tensor], factored: list) -> None:
        super().__init__()
        p, q = layer["ratio"]
        inner = p * config.intermediate_size // q
        heads = layer.get("heads")
        heads = config.num_attention_heads if heads is None else heads
        self.attention = FFNASAttention(config, heads) if heads else None
        self.all_ffn = nn.ModuleList(FFN(config, body, inner, factored) for _ in range(layer["stack"]))

    def forward(self, x: Tensor, mask: Tensor | None, keep_probabilities: bool) -> tuple[Tensor, Tensor | None]:
        probabilities = None
        if self.attention is not None:
            x, probabilities = self.attention(x, mask, keep_probabilities)
        for ffn in self.all_ffn:
            x = ffn(x)
        return x, probabilities


class FFNASPreTrainedModel(PreTrainedModel):
    """What the encoder and every head share."""

    config_class = FFNASConfig
    base_model_prefix = "ffnas"
    _no_split_modules = ["FFNASLayer", "FFNASEmbeddings"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, KronLinear):
            nn.init.normal_(module.a, std=self.config.initializer_range**0.5)
            nn.init.normal_(module.b, std=self.config.initializer_range**0.5)
        if isinstance(module, (nn.Linear, KronLinear)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


class FFNASModel(FFNASPreTrainedModel):
    """The encoder; `pooler_output` is the pooled sequence."""

    def __init__(self, config: FFNASConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        if len(config.layers) != len(BODIES):
            raise ValueError(f"config.layers has {len(config.layers)} layers, expressions_ffnas.py {len(BODIES)}")
        self.embeddings = FFNASEmbeddings(config)
        self.encoder = nn.ModuleList(
            FFNASLayer(config, *layer) for layer in zip(config.layers, BODIES, FACTORED, strict=True)
        )
        self.cls_pooler = Pooler(config) if add_pooling_layer else None
        teacher = config.teacher_hidden_size
        self.fit_dense = None if teacher is None else nn.Linear(config.hidden_size, teacher)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.token_embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """input_ids, attention_mask (1 or true at real tokens), token_type_ids, position_ids: [B, S]."""
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attention = self.config.output_attentions if output_attentions is None else output_attentions
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, None, :]
        hidden_states, attentions = (x,), ()
        for layer in self.encoder:
            x, probabilities = layer(x, mask, bool(keep_attention))
            hidden_states += (x,)
            attentions += (probabilities,)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=None if self.cls_pooler is None else self.cls_pooler(x, attention_mask),
            hidden_states=hidden_states if keep_hidden else None,
            attentions=attentions if keep_attention else None,
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class FFNASForSequenceClassification(FFNASPreTrainedModel):
    """Pooled sequence, dropout, linear."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """logits [B, num_labels]; `labels` [B] classes or values, or [B, num_labels] floats (multi-label)."""
        out = self.ffnas(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(out.pooler_output))
        loss = None if labels is None else _classification_loss(logits, labels, self.config.problem_type)
        output = SequenceClassifierOutput(loss, logits, out.hidden_states, out.attentions)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class FFNASForQuestionAnswering(FFNASPreTrainedModel):
    """Start and end scores per token."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """start_logits, end_logits [B, S]; positions [B], those outside the sequence are left out of the loss."""
        out = self.ffnas(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        start, end = self.qa_outputs(out.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (_position_loss(start, start_positions) + _position_loss(end, end_positions)) / 2
        output = QuestionAnsweringModelOutput(
            loss, start.contiguous(), end.contiguous(), out.hidden_states, out.attentions
        )
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class FFNASForMultipleChoice(FFNASPreTrainedModel):
    """One score per choice from its pooled sequence; inputs are [B, choices, S]."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple:
        """logits [B, choices]; `labels` [B]."""
        rows = [None if v is None else v.flatten(0, 1) for v in (input_ids, attention_mask, token_type_ids)]
        out = self.ffnas(*rows, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(out.pooler_output)).view(input_ids.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits, labels)
        output = MultipleChoiceModelOutput(loss, logits, out.hidden_states, out.attentions)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


class MaskedLMHead(nn.Module):
    """LayerNorm(gelu(dense(x))) in the token table's width, then a decoder tied to the table."""

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__()
        width = config.hidden_size if config.embedding_type == "full" else config.embedding_size
        self.dense = nn.Linear(config.hidden_size, width)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(width, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.layernorm(F.gelu(self.dense(hidden), approximate="tanh")))


class FFNASForMaskedLM(FFNASPreTrainedModel):
    """Token scores; the decoder shares the token table."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.decoder.weight": "ffnas.embeddings.token_embeddings.weight"
    }

    def __init__(self, config: FFNASConfig) -> None:
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head.decoder = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | tuple:
        """logits [B, S, V]; `labels` [B, S] token ids, -100 where no token is to be predicted."""
        out = self.ffnas(input_ids, attention_mask, token_type_ids, return_dict=True, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL)
        output = MaskedLMOutput(loss, logits, out.hidden_states, out.attentions)
        return output if _as_dict(self.config, return_dict) else output.to_tuple()


def _as_dict(config: FFNASConfig, return_dict: bool | None) -> bool:
    return getattr(config, "return_dict", True) if return_dict is None else return_dict


def _head_dropout(config: FFNASConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _classification_loss(logits: Tensor, labels: Tensor, problem_type: str | None) -> Tensor:
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        else:
            integer = not labels.is_floating_point()
            problem_type = "single_label_classification" if integer else "multi_label_classification"
    if problem_type == "regression":
        return F.mse_loss(logits.view(labels.shape), labels.to(logits.dtype))
    if problem_type == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def _position_loss(logits: Tensor, positions: Tensor) -> Tensor:
    length = logits.shape[1]
    targets = positions.view(-1).clamp(0, length)  # `length` marks answers cut off by truncation
    return F.cross_entropy(logits, targets, ignore_index=length)
