"""Models of every kind that the runtime takes, with weights wide enough for differences to show; and their answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine.student import (
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)
from engine.student.configuration import FFNASConfig
from engine.student.token_head import FFNASForTokenClassification

GELU = "linear1_1(gelu_erf(linear1_1(x,wb1)),wb2)"
HALF = "linear1_2(gelu_erf(linear1_2(x,wb1)),wb2)"
SIZES = {
    "hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 50, "vocab_size": 97,
    "max_position_embeddings": 40, "num_labels": 3, "hidden_dropout_prob": 0.1,
}  # fmt: skip
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "mean": (FFNASForSequenceClassification, {"pooling": "mean", "embedding_type": "full"}),
    "cls": (FFNASForSequenceClassification, {"pooling": "cls", "embedding_type": "full"}),
    "relu pooler": (FFNASForSequenceClassification, {"pooler_activation": "relu", "embedding_type": "full"}),
    "gelu pooler": (FFNASForSequenceClassification, {"pooler_activation": "gelu", "embedding_type": "full"}),
    "erf pooler": (FFNASForSequenceClassification, {"pooler_activation": "gelu_erf", "embedding_type": "full"}),
    "trigram": (FFNASForSequenceClassification, {"embedding_type": "trigram", "embedding_size": 13}),
    "factorized": (FFNASForSequenceClassification, {"embedding_type": "factorized", "embedding_size": 7}),
    "number": (FFNASForSequenceClassification, {"num_labels": 1, "problem_type": "regression"}),
    "spans": (FFNASForQuestionAnswering, {"embedding_type": "full"}),
    "labels": (FFNASForTokenClassification, {"embedding_type": "full", "num_labels": 5}),
    "masks": (FFNASForMaskedLM, {"embedding_type": "full"}),
    "masks, narrow table": (FFNASForMaskedLM, {"embedding_type": "factorized", "embedding_size": 7}),
    "choices": (FFNASForMultipleChoice, {"embedding_type": "full", "pooling": "cls"}),
    "choices by mean": (FFNASForMultipleChoice, {"embedding_type": "full", "pooling": "mean"}),
    "encoder": (FFNASModel, {"embedding_type": "full", "type_vocab_size": 3, "layer_norm_eps": 1e-5}),
    "fewer heads": (
        FFNASForSequenceClassification,
        {"layers": f"{HALF}@1, {GELU}@3", "pooling": "cls"},
    ),
    "no heads last": (FFNASForSequenceClassification, {"layers": f"{GELU}@4, {GELU}@0", "pooling": "cls"}),
    "no ffn last": (FFNASForSequenceClassification, {"layers": f"{GELU}@4, none@2", "pooling": "cls"}),
    "stacks": (
        FFNASForSequenceClassification,
        {
            "layers": "linear2_1(relu(linear2_1(x,wb1)),wb2), none, linear3_2(add(relu(linear3_2(x,wb1)),x),wb2)",
            "num_hidden_layers": 3,
        },
    ),
    "operators": (
        FFNASForSequenceClassification,
        {
            "layers": "max(linear1_1(swish(linear1_1(x,wb1)),wb2),elu(x)),"
            " linear1_1(mul(leaky_relu(linear1_1(x,wb1)),x),wb2), tanh(linear2_1(gelu(linear2_1(x,wb1)),wb2))",
            "num_hidden_layers": 3,
            "intermediate_size": 36,
        },
    ),
    "side by side": (
        FFNASForSequenceClassification,
        {"layers": f"add(linear1_1(x,wb1),sigmoid(linear1_1(x,wb2))), {GELU}", "intermediate_size": 36},
    ),
}
"""Class and options by name."""


def build(kind: str, **more: Any) -> Any:
    """A model in evaluation mode, its weights some times as wide as a fresh model's."""
    model_class, own = KINDS[kind]
    torch.manual_seed(7)
    model = model_class(FFNASConfig(**{**SIZES, **own, **more})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
    return model


def inputs(
    batch: int, length: int, vocabulary: int = 97, types: int = 2, holes: bool = False
) -> tuple[np.ndarray, ...]:
    """ids, mask and types [batch, length]; rows of other lengths after the first; `holes`: padding inside one too."""
    rng = np.random.default_rng(batch * 1000 + length)
    ids = rng.integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, rng.integers(1, length + 1) :] = 0
    if holes and length > 3:
        mask[0, 1:3] = 0
    return ids, mask, rng.integers(0, types, (batch, length))


@torch.no_grad()
def answers(model: Any, ids: np.ndarray, mask: np.ndarray, types: np.ndarray, wanted: str = "head") -> np.ndarray:
    """What the model says in float64, every layer called one by one by PyTorch."""
    exact = model.double()
    given = (torch.from_numpy(v) for v in (ids, mask, types))
    out = exact(**dict(zip(("input_ids", "attention_mask", "token_type_ids"), given, strict=True)))
    if wanted == "hidden":
        found = out.last_hidden_state
    elif wanted in ("mean", "cls", "max"):
        real = [row[torch.from_numpy(m) != 0] for row, m in zip(out.last_hidden_state, mask, strict=True)]
        one = {"mean": lambda x: x.mean(0), "cls": lambda x: x[0], "max": lambda x: x.amax(0)}[wanted]
        found = torch.stack([one(x) for x in real])
    elif wanted == "pooled":
        found = out.pooler_output
    elif isinstance(model, FFNASForQuestionAnswering):
        found = torch.stack([out.start_logits, out.end_logits], dim=-1)
    else:
        found = out.logits
    return found.numpy()
