"""Question answering by a span of a context: start and end scores [B, S, 2] of windows, accepted answers as gold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.results import Found, Measured, Predictions
from engine.data.rows import Gold, Rows
from engine.data.task import TaskHead, TaskSpec
from engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from engine.data.dataset import EncodedDataset
    from engine.evaluation.answers import Answer

PADDED_SCORE = -1e4
"""Score of a padded position: no probability at any temperature below a hundred."""

_COLUMNS = {"exact_match": 0, "f1": 1}
"""Of what is kept of each question."""


class QuestionAnswering(TaskHead):
    """See the module."""

    kind: ClassVar[str] = "question_answering"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "exact_match")
    windows: ClassVar[bool] = True
    default_length: ClassVar[int] = 384
    most_rows: ClassVar[int | None] = 64  # windows are long
    kept: ClassVar[str] = "scores"
    label_dtype: ClassVar[type[np.generic] | None] = None
    suffixes: ClassVar[tuple[str, ...]] = (".json",)

    def check(self, spec: TaskSpec) -> None:
        """A question and a context, no classes."""
        if len(spec.text_columns) != 2:
            raise UserError(
                f"task {spec.name!r} has {len(spec.text_columns)} text columns: give the question's and the context's"
            )
        if spec.label_names:
            raise UserError(f"task {spec.name!r} is a {self.kind} and has label names: leave them out")

    def groups(self, rows: Rows) -> Sequence[str] | None:
        """Questions about one context stay together."""
        return rows.texts[1]

    def describe_labels(self, spec: TaskSpec, parts: Sequence[Rows]) -> str:
        """How many questions have an answer."""
        answered = sum(bool(gold.texts) for rows in parts for gold in rows.golds or ())
        return f"{answered:,} of {sum(map(len, parts)):,} questions have an answer"

    def encode(
        self,
        rows: Rows,
        spec: TaskSpec,
        tokenizer: Any,
        max_length: int,
        *,
        stride: int | None = None,
        published: bool = False,
    ) -> EncodedDataset:
        """Windows of the contexts (`engine.data.encode_spans`)."""
        from engine.data.encode_spans import encode_spans

        return encode_spans(rows, tokenizer, max_length, stride)

    def student_class(self) -> type[Any]:
        """Question answering."""
        from engine.student.heads import FFNASForQuestionAnswering

        return FFNASForQuestionAnswering

    def config_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """Start and end."""
        return {"num_labels": 2}

    def answer_shape(self, spec: TaskSpec, rows: int, columns: int) -> tuple[int, ...]:
        """[B, S, 2]."""
        return (rows, columns, 2)

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean of start's and end's cross-entropy; `labels` [B, 2] positions."""
        from engine.tasks.losses import cross_entropy

        return cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten())

    def teacher_loss(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """T² KL of the distributions over real tokens, mean over start and end."""
        from engine.tasks.losses import divergence

        own, wanted = (_over_tokens(logits, mask).flatten(0, 1) for logits in (student, teacher))
        return divergence(own, wanted, temperature)

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor | None,
        mask: Tensor,
        labels: Tensor | None,
        *,
        temperature: float,
        paper_exact: bool,
    ) -> Tensor:
        """The mean of start's and end's soft cross-entropy over real tokens; the paper's leaves out the first one."""
        from engine.tasks.losses import comparable, soft_labels
        from kernels.losses.paper import span_soft_cross_entropy_paper

        teacher = comparable(student, teacher)
        if paper_exact:
            return span_soft_cross_entropy_paper(student, teacher, mask, temperature)
        own, wanted = (_over_tokens(logits, mask).contiguous() for logits in (student, teacher))
        return soft_labels(own, wanted, temperature, False)

    def answer(self, spec: TaskSpec, data: EncodedDataset, found: Found) -> list[Answer]:
        """One per question (`engine.evaluation.answers`)."""
        from engine.evaluation.answers import AnswerCollector

        collector = AnswerCollector(data)
        for rows, outputs in found:
            collector.add(rows, outputs)
        return collector.answers()

    def gold(self, rows: Rows) -> list[Gold] | None:
        """Accepted answers."""
        return rows.golds

    def gold_of(self, data: EncodedDataset) -> list[Gold] | None:
        """Accepted answers of the questions that windows are of."""
        return None if data.spans is None else data.spans.questions.golds

    def score(
        self,
        spec: TaskSpec,
        answers: list[Answer],
        gold: list[Gold],
        *,
        kept: np.ndarray | None = None,
        threshold: float = 0.0,
    ) -> Measured:
        """Official scores; exact match and F1 are kept of each question."""
        from engine.evaluation.answers import answer_metrics, answer_scores

        if kept is not None:
            answers = [answers[row] for row in kept.tolist()]
        may, least = spec.no_answer, threshold
        metrics = answer_metrics(answers, gold, no_answer=may, threshold=least)
        return Measured(metrics, lambda: answer_scores(answers, gold, no_answer=may, threshold=least))

    def threshold(self, spec: TaskSpec, answers: Callable[[], list[Answer]], gold: list[Gold]) -> float:
        """The lead at which "no answer" is the answer, where a question may have none."""
        from engine.evaluation.answers import best_threshold

        return best_threshold(answers(), gold) if spec.no_answer else 0.0

    def kept_columns(self, spec: TaskSpec) -> int:
        """Exact match and F1."""
        return len(_COLUMNS)

    def metric(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None) -> float:
        """The mean over questions."""
        return float(rows[:, _COLUMNS[spec.metric]].astype(np.float64).mean())

    def resampled(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        """The mean over the drawn questions."""
        from engine.evaluation.weighted import mean_of

        return mean_of(rows[:, _COLUMNS[spec.metric]], counts)

    def predictions(
        self, spec: TaskSpec, key: str, names: Sequence[Any], answers: list[Answer], *, every: bool, threshold: float
    ) -> Predictions:
        """SQuAD's prediction file {id: text}; beside it the best answers, and the lead of "no answer"."""
        texts = [answer.at(threshold) if spec.no_answer else answer.text for answer in answers]
        named = list(zip(names, answers, strict=True))
        best = {name: [{"text": text, "score": score} for text, score in answer.best] for name, answer in named}
        beside: dict[str, Any] = {"_nbest.json": best}
        if spec.no_answer:
            beside["_null_odds.json"] = {name: answer.no_answer - answer.score for name, answer in named}
        return Predictions(document=dict(zip(names, texts, strict=True)), beside=beside)


def _over_tokens(logits: Tensor, mask: Tensor) -> Tensor:
    """[B, 2, S] float32 scores of [B, S, 2], padding out of the question."""
    return logits.float().transpose(1, 2).masked_fill(~mask[:, None, :], PADDED_SCORE)
