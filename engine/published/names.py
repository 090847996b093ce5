"""Names of the published checkpoints' tensors, and which of our models have them."""

from __future__ import annotations

import re

from engine.errors import UserError
from engine.student.heads import (
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
)
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel

RENAMED = (
    ("embeddings.", "ffnas.embeddings."),
    ("encoder.", "ffnas.encoder."),
    ("fit_dense.", "ffnas.fit_dense."),
    ("cls_pooler.", "ffnas.cls_pooler."),
    ("classifier.", "classifier."),
)
"""Published name, our name; what follows is the same. The head of question answering is our `qa_outputs`."""

KINDS: dict[str, type[FFNASPreTrainedModel]] = {
    "classification": FFNASForSequenceClassification,
    "question-answering": FFNASForQuestionAnswering,
    "multiple-choice": FFNASForMultipleChoice,
    "encoder": FFNASModel,
}
FFN = re.compile(r"encoder\.(\d+)\.all_ffn\.(\d+)\.(dense1|dense2|layernorm)\.(weight|bias)")
TASK_HEAD = re.compile(r"classifiers\.([^.]+)\.(weight|bias)")


def published_name(name: str) -> str:
    """The published name of one of our parameters, of a model with or without a head around the encoder."""
    if name.startswith("qa_outputs."):
        return f"classifier.{name.removeprefix('qa_outputs.')}"
    for published, ours in RENAMED:
        for prefix in (ours, ours.removeprefix("ffnas.")):
            if name.startswith(prefix):
                return f"{published}{name.removeprefix(prefix)}"
    raise UserError(f"model: {name} has no published name; convert a classification or question answering model")
