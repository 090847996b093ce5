"""Answers to questions from the scores of windows, and their official scores.

Every window gives its best spans: start and end among the highest `N_BEST` each, inside the context, in order, at most
`max_length` tokens long. A question's answer is the best span of its windows, or none (SQuAD v2.0) where the score of
"no answer", start plus end score of the first token, the least over the windows, is higher by more than a threshold.

Exact match and F1 come from torchmetrics, which follows the official scripts; an unanswerable question has the empty
answer as its only accepted one, and in v2.0 accepted answers without a word in them ("the") do not count.

Sources: Devlin et al., BERT (NAACL 2019), sections 4.2 and 4.3; Rajpurkar et al. (EMNLP 2016; ACL 2018), evaluation
scripts. Rejected: the `evaluate` library, which fetches each metric's code from the network.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.data import EncodedDataset
    from engine.data.rows import Gold

N_BEST = 20
MAX_ANSWER = 30
"""Most tokens of an answer; BERT's published setting."""

_LOWEST = -1e30
_BLOCK = 64


@dataclass(frozen=True)
class Answer:
    """What a model answers to one question.

    Attributes:
        text: the best span, as it stands in the context.
        score: its start plus end score.
        no_answer: score of "no answer"; the least over the windows.
        best: further spans with their scores, best first, `text` among them.
    """

    text: str
    score: float
    no_answer: float
    best: tuple[tuple[str, float], ...]

    def at(self, threshold: float) -> str:
        """The answer where none is possible: empty if `no_answer` is ahead by more than `threshold`."""
        return "" if self.no_answer - self.score > threshold else self.text


def best_spans(logits: Tensor, inside: Tensor, *, n_best: int = N_BEST, max_length: int = MAX_ANSWER) -> list[Tensor]:
    """The best spans of windows, highest score first.

    Args:
        logits: [B, S, 2] start and end scores.
        inside: [B, S] bool, True at tokens of the context.
        n_best: starts and ends to combine, and spans to give.
        max_length: most tokens of a span.

    Returns:
        float64 score, int64 first and int64 last token, [B, n] each with n <= n_best; scores of -1e30 and below mark
        places without a span.
    """
    scores = logits.double().masked_fill(~inside[..., None], _LOWEST)
    count = min(n_best, logits.shape[1])
    start, first = scores[..., 0].topk(count, dim=1)
    end, last = scores[..., 1].topk(count, dim=1)
    total = start[:, :, None] + end[:, None, :]
    length = last[:, None, :] - first[:, :, None] + 1
    total = total.masked_fill((length < 1) | (length > max_length), 2 * _LOWEST).flatten(1)
    best, place = total.topk(min(n_best, total.shape[1]), dim=1)
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return [best, first[rows, place // count], last[rows, place % count]]


class AnswerCollector:
    """Gathers the windows of a data set, in any order, into one answer per question.

    Args:
        data: windows with `spans`.
        n_best, max_length: as for `best_spans`.
    """

    def __init__(self, data: EncodedDataset, *, n_best: int = N_BEST, max_length: int = MAX_ANSWER) -> None:
        if data.spans is None:
            raise ValueError("data: needs windows of question answering")
        self.data, self.spans = data, data.spans
        self.n_best, self.max_length = n_best, max_length
        count = len(self.spans.questions)
        self._found: list[list[tuple[float, int, int]]] = [[] for _ in range(count)]
        self._none = np.full(count, np.inf)

    def add(self, rows: np.ndarray, logits: Tensor) -> None:
        """Takes the [B, S, 2] scores of the windows at `rows`.

        Raises:
            FloatingPointError: a score is NaN or infinite: the model has diverged.
        """
        starts = [self._characters(row, self.spans.start) for row in rows]
        inside = np.zeros(logits.shape[:2], dtype=bool)
        for place, start in enumerate(starts):
            inside[place, : len(start)] = start >= 0
        logits = logits.float().cpu()
        if not torch.isfinite(logits).all():
            raise FloatingPointError("predictions contain NaN or infinity: the model has diverged")
        spans = best_spans(logits, torch.from_numpy(inside), n_best=self.n_best, max_length=self.max_length)
        scores, first, last = (values.numpy() for values in spans)
        none = logits[:, 0].double().sum(dim=-1).numpy()
        for place, row in enumerate(rows):
            question = self.spans.question[row]
            end = self._characters(row, self.spans.end)
            self._none[question] = min(self._none[question], none[place])
            for score, begin, stop in zip(scores[place], first[place], last[place], strict=True):
                if score > _LOWEST:
                    self._found[question].append((float(score), int(starts[place][begin]), int(end[stop])))

    def answers(self) -> list[Answer]:
        """One per question, in the order of `spans.questions`."""
        answers = []
        for context, found, none in zip(self.spans.questions.texts[1], self._found, self._none, strict=True):
            best: dict[str, float] = {}
            for score, begin, behind in sorted(found, key=lambda f: (-f[0], f[1], f[2])):
                best.setdefault(context[begin:behind], score)
            shown = tuple(best.items())[: self.n_best]
            text, score = shown[0] if shown else ("", _LOWEST)
            answers.append(Answer(text, score, float(none), shown))
        return answers

    def _characters(self, row: int, values: np.ndarray) -> np.ndarray:
        return values[self.data.offsets[row] : self.data.offsets[row + 1]]


def answer_metrics(
    answers: Sequence[Answer], golds: Sequence[Gold], *, no_answer: bool, threshold: float = 0.0
) -> dict[str, float]:
    """Official scores, in 0..1.

    Args:
        answers: one per question.
        golds: accepted answers.
        no_answer: whether "no answer" may be the answer (v2.0).
        threshold: see `Answer.at`.

    Returns:
        `exact_match` and `f1`; with `no_answer` also `answered_f1` over the questions that have an answer and
        `unanswered_accuracy` over the others, where there are any.
    """
    texts = [answer.at(threshold) if no_answer else answer.text for answer in answers]
    return text_metrics(texts, golds, no_answer=no_answer)


def answer_scores(
    answers: Sequence[Answer], golds: Sequence[Gold], *, no_answer: bool, threshold: float = 0.0
) -> np.ndarray:
    """Exact match and F1 of each question by itself, [N, 2] float32; arguments as of `answer_metrics`."""
    scores = np.empty((len(answers), 2), dtype=np.float32)
    for place, (answer, gold) in enumerate(zip(answers, golds, strict=True)):
        one = answer_metrics([answer], [gold], no_answer=no_answer, threshold=threshold)
        scores[place] = one["exact_match"], one["f1"]
    return scores


def text_metrics(texts: Sequence[str], golds: Sequence[Gold], *, no_answer: bool) -> dict[str, float]:
    """`answer_metrics` of plain texts, empty ones for "no answer".

    Raises:
        ValueError: there are no questions, or not one answer each.
    """
    if len(texts) != len(golds) or not texts:
        raise ValueError(f"{len(texts)} answers to {len(golds)} questions: need one each, and at least one")
    accepted = [[t for t in gold.texts if not no_answer or _has_words(t)] or [""] for gold in golds]
    exact, f1 = _official(texts, accepted)
    metrics = {"exact_match": exact, "f1": f1}
    if no_answer:
        for name, chosen, place in (
            ("answered_f1", [i for i, gold in enumerate(accepted) if gold != [""]], 1),
            ("unanswered_accuracy", [i for i, gold in enumerate(accepted) if gold == [""]], 0),
        ):
            if chosen:
                metrics[name] = _official([texts[i] for i in chosen], [accepted[i] for i in chosen])[place]
    return metrics


def best_threshold(answers: Sequence[Answer], golds: Sequence[Gold]) -> float:
    """The threshold with the highest F1 on these questions; of equals the one nearest to 0.

    Raising it past a question's lead of "no answer" turns that question's answer from empty to its text.
    """
    leads = np.array([answer.no_answer - answer.score for answer in answers])
    gains = np.empty(len(answers))
    for i, (answer, gold) in enumerate(zip(answers, golds, strict=True)):
        with_text, without = (text_metrics([text], [gold], no_answer=True)["f1"] for text in (answer.text, ""))
        gains[i] = with_text - without
    order = np.argsort(leads, kind="stable")
    values, inverse = np.unique(leads[order], return_inverse=True)
    cumulated = np.cumsum(np.bincount(inverse, weights=gains[order], minlength=len(values)))
    candidates = np.concatenate([[min(values[0] - 1.0, 0.0)], values])
    totals = np.concatenate([[0.0], cumulated])
    at_zero = np.searchsorted(values, 0.0, side="right")
    best = np.flatnonzero(totals >= totals.max() - 1e-12)
    if at_zero in best:
        return 0.0
    return float(min(candidates[best], key=abs))


def _official(texts: Sequence[str], accepted: Sequence[list[str]]) -> tuple[float, float]:
    """Means of exact match and F1 over questions; summed in float64, since torchmetrics adds up in float32."""
    from torchmetrics.functional.text.squad import squad

    sums = np.zeros(2)
    for begin in range(0, len(texts), _BLOCK):
        part = slice(begin, begin + _BLOCK)
        predicted = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(texts[part])]
        target: list[Any] = [
            {"answers": {"text": golds, "answer_start": [0] * len(golds)}, "id": str(i)}
            for i, golds in enumerate(accepted[part])
        ]
        scores = squad(predicted, target)
        sums += [float(scores[name]) / 100 * len(predicted) for name in ("exact_match", "f1")]
    exact, f1 = sums / len(texts)
    return float(exact), float(f1)


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def _has_words(text: str) -> bool:
    """Whether anything is left of an answer once case, punctuation and articles are taken away."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return bool(_ARTICLES.sub(" ", bare).split())
