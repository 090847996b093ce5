# SPDX-License-Identifier: Apache-2.0
"""Configuration of an ffnas encoder: a BERT-like encoder whose feed-forward networks were found by search.

Needs transformers only. The architecture is fixed: each layer's formula is in `expressions_ffnas.py`.
"""

from typing import Any

from transformers import PretrainedConfig


class FFNASConfig(PretrainedConfig):
    """Sizes and layers.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: as in BERT.
        intermediate_size: F; a layer of ratio p/q has FFNs of inner width F * p // q.
        embedding_type: "trigram" (V x E table, three neighbouring tokens mapped to the hidden size),
            "factorized" (V x E table, each token mapped to the hidden size) or "full".
        embedding_size: E.
        layers: one {"expression", "stack", "ratio": [p, q]} per layer; `stack` FFNs follow each attention block, which
            has `"heads"` heads where that is given (0: there is no block) and all heads otherwise.
        source_layers: which layers of the model they were taken from the layers are, None for all or none known.
        width_policy: of binary operators on unequal widths, "truncate" or "pad"; written into the formulas.
        kron_block: [p, q], how weights that are Kronecker products are factored.
        teacher_hidden_size: width of a distillation projection kept with the weights, None for none.
        hidden_dropout_prob, attention_probs_dropout_prob, classifier_dropout: dropout while training.
        pooling: what sequence heads read: "cls" (first token, dense layer, activation) or "mean" (mean of real tokens).
        pooler_activation: "tanh", "relu", "gelu" (tanh form) or "gelu_erf".
        token_head: of token classification: "softmax", or "crf" with scores of one tag after another.
        layer_norm_eps, max_position_embeddings, type_vocab_size, initializer_range: as in BERT.
    """

    model_type = "ffnas"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 540,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 540,
        embedding_type: str = "trigram",
        embedding_size: int = 128,
        layers: list[dict] | None = None,
        source_layers: list[int] | None = None,
        width_policy: str = "truncate",
        kron_block: list[int] | None = None,
        teacher_hidden_size: int | None = None,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        pad_token_id: int | None = 0,
        classifier_dropout: float | None = None,
        tie_word_embeddings: bool = True,
        pooling: str = "cls",
        pooler_activation: str = "tanh",
        token_head: str = "softmax",
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.embedding_type = embedding_type
        self.embedding_size = embedding_size
        self.layers = layers if layers is not None else []
        self.source_layers = source_layers
        self.width_policy = width_policy
        self.kron_block = kron_block
        self.teacher_hidden_size = teacher_hidden_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.classifier_dropout = classifier_dropout
        self.pooling = pooling
        self.pooler_activation = pooler_activation
        self.token_head = token_head
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)
