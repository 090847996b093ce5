# SPDX-License-Identifier: Apache-2.0
"""Extractive question answering as a pipeline, for versions of transformers that have none. Needs torch and
transformers only.

    pipeline("question-answering", model=FOLDER, trust_remote_code=True)(question="...", context="...")
"""

from typing import Any

import torch
from transformers import Pipeline


class QuestionAnsweringPipeline(Pipeline):
    """Answers {"question", "context"} with {"answer", "start", "end", "score"}; characters of the context.

    Long contexts are read in overlapping windows. A score is the product of the probabilities of the first and the last
    token, each among all tokens of the context in all windows.
    """

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        """Options: `max_seq_len` and `doc_stride` (tokens), `max_answer_len` (tokens), `top_k`."""
        before = {k: kwargs[k] for k in ("max_seq_len", "doc_stride") if kwargs.get(k) is not None}
        after = {k: kwargs[k] for k in ("max_answer_len", "top_k") if kwargs.get(k) is not None}
        unknown = set(kwargs) - {"max_seq_len", "doc_stride", "max_answer_len", "top_k"}
        if unknown:
            raise ValueError(f"unknown options: {', '.join(sorted(unknown))}")
        return before, {}, after

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **kwargs: Any) -> Any:
        """One {"question", "context"}, a list of them, or `question=..., context=...` (texts, or lists of texts)."""
        if inputs is None:
            if isinstance(question, str) and isinstance(context, str):
                inputs = {"question": question, "context": context}
            else:
                contexts = [context] * len(question) if isinstance(context, str) else context
                inputs = [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]
        return super().__call__(inputs, **kwargs)

    def preprocess(self, inputs: dict, max_seq_len: int = 384, doc_stride: int = 128) -> dict:
        """Windows of one question and its context."""
        limit = min(max_seq_len, self.model.config.max_position_embeddings)
        windows = self.tokenizer(
            inputs["question"],
            inputs["context"],
            truncation="only_second",
            max_length=limit,
            stride=min(doc_stride, limit // 4),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=True,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask", "token_type_ids")
        in_context = [[s == 1 for s in windows.sequence_ids(i)] for i in range(len(windows["input_ids"]))]
        return {
            "model_inputs": {name: windows[name] for name in names if name in windows},
            "in_context": torch.tensor(in_context),
            "offsets": windows["offset_mapping"],
            "context": inputs["context"],
        }

    def _forward(self, model_inputs: dict) -> dict:
        output = self.model(**model_inputs.pop("model_inputs"))
        return {**model_inputs, "start": output.start_logits, "end": output.end_logits}

    def postprocess(self, outputs: dict, max_answer_len: int = 30, top_k: int = 1) -> Any:
        """The best answer, or a list of the `top_k` best that differ."""
        allowed = outputs["in_context"].cpu()
        start, end = (_probabilities(outputs[name].float().cpu(), allowed) for name in ("start", "end"))
        length = start.shape[1]
        pairs = torch.ones(length, length, dtype=torch.bool).triu().tril(max_answer_len - 1)
        scores = (start[:, :, None] * end[:, None, :]).masked_fill(~pairs, 0.0)
        found: list[dict] = []
        for index in scores.flatten().argsort(descending=True).tolist():
            score = scores.flatten()[index].item()
            if score == 0.0 or len(found) == top_k:
                break
            window, rest = divmod(index, length * length)
            offsets = outputs["offsets"][window]
            first, last = int(offsets[rest // length][0]), int(offsets[rest % length][1])
            if all((first, last) != (f["start"], f["end"]) for f in found):
                found.append({"score": score, "start": first, "end": last, "answer": outputs["context"][first:last]})
        if top_k == 1:
            return found[0] if found else {"score": 0.0, "start": 0, "end": 0, "answer": ""}
        return found


def _probabilities(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax over the allowed tokens of all windows together, [windows, S]; all 0 where there are none."""
    flat = logits.masked_fill(~allowed, -torch.inf).flatten().softmax(dim=0)
    return flat.nan_to_num().view(logits.shape)
