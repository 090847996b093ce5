"""Tags of words: named entities, parts of speech. Two kinds of tasks, `tokens` with a softmax for every word and
`tokens_crf` with a linear-chain CRF, which read the same files and are measured alike.

A word is answered at its first token; labels say where (`engine.data.encode_tags`). Entities are scored by conlleval's
rules (`engine.evaluation.entities`), tags that name none by accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.results import Found, Measured, Predictions
from engine.data.rows import NO_LABEL, Rows
from engine.data.tags import Tags, are_entities, words_of
from engine.data.task import TaskHead, TaskSpec
from engine.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from engine.data import Batch
    from engine.data.dataset import EncodedDataset


@dataclass(frozen=True)
class Tagged:
    """Sentences and the numbers of their words' tags, [words] each."""

    texts: Sequence[str]
    tags: list[np.ndarray]

    def sentences(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Words and tags of each."""
        return ((words_of(text), tags) for text, tags in zip(self.texts, self.tags, strict=True))


class Tokens(TaskHead):
    """See the module."""

    kind: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = ("f1", "accuracy", "precision", "recall")
    from_files: ClassVar[bool] = True
    inherits: ClassVar[bool] = True
    windows: ClassVar[bool] = True
    named_outputs: ClassVar[bool] = True
    kept: ClassVar[str] = "counts"
    label_dtype: ClassVar[type[np.generic] | None] = None
    suffixes: ClassVar[tuple[str, ...]] = (".conll", ".jsonl")
    crf: ClassVar[bool] = False

    def check(self, spec: TaskSpec) -> None:
        """One text, two or more tags; F1 of entities only where tags name some."""
        if len(spec.text_columns) != 1:
            raise UserError(f"task {spec.name!r} has {len(spec.text_columns)} text columns: sentences of words are one")
        if len(spec.label_names) < 2:
            raise UserError(f"task {spec.name!r} has {len(spec.label_names)} tag(s): tagging needs two")
        if spec.metric != "accuracy" and not are_entities(spec.label_names):
            raise UserError(f"metric {spec.metric!r} counts entities, and no tag names one: choose accuracy")

    def reads(self, source: str) -> bool:
        """CoNLL columns, CoNLL-U, JSON Lines with tokens."""
        from engine.data.read_tags import holds_tags

        return holds_tags(source)

    def read(self, config: Any, notes: list[str]) -> tuple[TaskSpec, Rows, Rows | None, Any]:
        """The task and its sentences (`engine.data.load_tags`); `data.kind` chooses the head."""
        from engine.data.load_tags import load_tags

        return load_tags(config, notes)

    def asked_rows(self, source: str, encoding: str, spec: TaskSpec) -> Rows:
        """Sentences, with tags where they are the model's."""
        from engine.data.load_tags import asked_rows

        return asked_rows(source, spec, encoding)

    def merged(self, values: Sequence[Any]) -> Any:
        """The most frequent tags, of equals the first; of sentences with tags where some have none."""
        return super().merged([tags for tags in values if min(tags.ids, default=0) >= 0] or values)

    def describe_labels(self, spec: TaskSpec, parts: Sequence[Rows]) -> str:
        """Sentences, words and how many entities of each type, or tags, there are."""
        from engine.data.load_tags import told_tags

        return told_tags(spec, parts)

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
        """Windows of whole words."""
        from engine.data.encode_tags import encode_tags

        return encode_tags(rows, tokenizer, max_length, stride)

    def student_class(self) -> type[Any]:
        """Token classification."""
        from engine.student.token_head import FFNASForTokenClassification

        return FFNASForTokenClassification

    def config_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """The names of the tags."""
        names = dict(enumerate(spec.label_names))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}, "num_labels": len(names)}

    def own_fields(self, spec: TaskSpec) -> dict[str, Any]:
        """And the kind of head."""
        return {"token_head": "crf" if self.crf else "softmax"}

    def headed(self, model: nn.Module) -> nn.Module:
        """With transitions where the kind has them; a CRF stays one."""
        if self.crf and model.transitions is None:
            model.add_crf()
        return model

    def spec_of(self, config: Mapping[str, Any]) -> TaskSpec | None:
        """Of a token classifier that names its tags."""
        made = str((config.get("architectures") or [""])[0])
        if not made.endswith("ForTokenClassification") or (config.get("token_head") == "crf") != self.crf:
            return None
        names = dict(config.get("id2label") or {})
        tags = tuple(str(names[key]) for key in sorted(names, key=int)) or ("LABEL_0", "LABEL_1")
        return TaskSpec("rows", self.kind, ("text",), "tags", tags, "f1" if are_entities(tags) else "accuracy")

    def answer_shape(self, spec: TaskSpec, rows: int, columns: int) -> tuple[int, ...]:
        """`engine.student.chain`'s."""
        from engine.student.chain import rows_of

        return (rows, rows_of(columns, spec.num_labels, crf=self.crf), spec.num_labels)

    def places(self, batch: Batch) -> Tensor:
        """Words' first tokens; in text without labels all real tokens."""
        return batch.mask if batch.labels is None else batch.labels != NO_LABEL

    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihood per word."""
        from engine.tasks.structure import gold_loss

        return gold_loss(logits, labels, labels != NO_LABEL)

    def teacher_loss(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """Structural: T² KL of whole sequences per word (`engine.tasks.structure`); `mask` as `places` gives it."""
        from engine.tasks.structure import structural_loss

        return structural_loss(student, teacher, mask, temperature)

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
        """`teacher_loss`, or the published arithmetic."""
        from engine.tasks.structure import paper_loss, structural_loss

        if teacher is None:
            raise UserError("prediction: the teacher gave no scores: load it with a task, or leave the term out")
        if student.shape[-1] != teacher.shape[-1]:
            raise UserError(
                f"num_labels: the student has {student.shape[-1]} tags, the teacher {teacher.shape[-1]}: both need the"
                " task's"
            )
        loss = paper_loss if paper_exact else structural_loss
        return loss(student, teacher, mask if labels is None else labels != NO_LABEL, temperature)

    def divergence(self, student: Tensor, teacher: Tensor, places: Tensor | None = None) -> Tensor:
        """[B] KL(teacher || student) of whole tag sequences."""
        from engine.tasks.structure import divergences

        if places is None:
            raise ValueError(f"{self.kind}: answers are compared at words, give places")
        return divergences(student, teacher, places)

    def outputs(self, data: EncodedDataset, found: Found) -> tuple[Tensor, Tensor]:
        """Scores at the words of every sentence [N, W (+ L + 2), L], and which words there are [N, W]."""
        from engine.tasks.structure import of_sentences

        return of_sentences(data, found)

    def rows_apart(self, own: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
        """[N] KL of whole tag sequences."""
        return self.divergence(own[0], wanted[0], wanted[1])

    def kept_apart(self, rows: np.ndarray, wanted: np.ndarray) -> None:
        """None: what is kept of sentences are counts."""

    def no_labels(self, count: int, like: np.ndarray) -> np.ndarray:
        """Of tokens: none is a word's first one."""
        raise UserError(
            "data.text: a tagger takes no plain text: give sentences in --data.train, without tags if need be"
        )

    def answer(self, spec: TaskSpec, data: EncodedDataset, found: Found) -> Tagged:
        """Tags of every sentence; words of windows that are not in `data` have -1."""
        import torch

        from engine.student.chain import best_tags
        from engine.tasks.structure import word_places

        assert data.spans is not None
        answers = [np.full(len(words_of(text)), -1, dtype=np.int64) for text in data.spans.questions.texts[0]]
        for rows, outputs in found:
            if not torch.isfinite(outputs).all():
                raise FloatingPointError("scores of tags contain NaN or infinity: the model has diverged")
            places, words = word_places(data, rows)
            for row, own, tags in zip(rows.tolist(), words, best_tags(outputs, places).numpy(), strict=True):
                answers[int(data.spans.question[row])][own] = tags[: len(own)]
        return Tagged(data.spans.questions.texts[0], answers)

    def gold(self, rows: Rows) -> list[Tags] | None:
        """Tags of the words."""
        return rows.golds

    def gold_of(self, data: EncodedDataset) -> list[Tags] | None:
        """Those of the sentences that windows are of."""
        return None if data.spans is None else data.spans.questions.golds

    def score(
        self,
        spec: TaskSpec,
        answers: Tagged,
        gold: list[Tags],
        *,
        kept: np.ndarray | None = None,
        threshold: float = 0.0,
    ) -> Measured:
        """Entity F1, precision, recall and accuracy; counts are kept of each sentence."""
        from engine.evaluation.entities import metrics_of

        tags = answers.tags if kept is None else [answers.tags[row] for row in kept.tolist()]
        counts = np.stack([self._counts(spec, a, g) for a, g in zip(tags, gold, strict=True)])
        found = {name: float(value) for name, value in metrics_of(counts.sum(axis=0)).items()}
        if not are_entities(spec.label_names):
            found = {"accuracy": found["accuracy"]}
        return Measured(found, lambda: counts.astype(np.float32))

    def _counts(self, spec: TaskSpec, answer: np.ndarray, gold: Tags) -> np.ndarray:
        from engine.evaluation.entities import counts_of, types_of

        names, types = spec.label_names, types_of(spec.label_names)
        asked = (answer >= 0) & (np.asarray(gold.ids) >= 0)
        own, true = ([names[t] for t in np.asarray(tags)[asked].tolist()] for tags in (answer, gold.ids))
        return counts_of(own, true, types, entities=are_entities(names))

    def kept_columns(self, spec: TaskSpec) -> int:
        """Words right, words, and three numbers of every type."""
        from engine.evaluation.entities import types_of

        return 2 + 3 * len(types_of(spec.label_names))

    def metric(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None) -> float:
        """Of the counts' sum."""
        from engine.evaluation.entities import metrics_of

        return float(metrics_of(rows.astype(np.float64).sum(axis=0))[spec.metric])

    def resampled(self, spec: TaskSpec, rows: np.ndarray, labels: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
        """Of the sums over the drawn sentences."""
        from engine.evaluation.entities import metrics_of

        return metrics_of(counts.astype(np.float64) @ rows.astype(np.float64))[spec.metric]

    def shown(self, spec: TaskSpec, rows: np.ndarray, dev: Rows, *, samples: bool, seed: int) -> dict[str, Any]:
        """Type by type."""
        from engine.evaluation.entities import table_of, types_of

        classes = table_of(rows.astype(np.float64).sum(axis=0), types_of(spec.label_names))
        return {"classes": classes, "confusion": None, "samples": None}

    def predictions(
        self, spec: TaskSpec, key: str, names: Sequence[Any], answers: Tagged, *, every: bool, threshold: float
    ) -> Predictions:
        """CoNLL's columns, a word and its tag a line; or JSON Lines of `tokens` and `tags`."""
        columns, lines = [], []
        for words, answer in answers.sentences():
            tags = [spec.label_names[tag] for tag in answer.tolist()]
            columns.append("".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)))
            lines.append(json.dumps({"tokens": words, "tags": tags}, ensure_ascii=False))
        return Predictions(texts={".conll": "\n".join(columns), ".jsonl": "".join(f"{line}\n" for line in lines)})


class TokensCRF(Tokens):
    """With a linear-chain CRF."""

    kind: ClassVar[str] = "tokens_crf"
    crf: ClassVar[bool] = True

    def reads(self, source: str) -> bool:
        """`Tokens` reads the files of both."""
        return False
