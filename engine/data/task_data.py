"""The splits of a task, as texts and tokenized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from engine.data.rows import Rows
from engine.data.task import TaskSpec

if TYPE_CHECKING:
    from engine.data.dataset import EncodedDataset
    from engine.data.shards import ShardedText


@dataclass(frozen=True)
class FileRead:
    """What was made of one file.

    Attributes:
        role: `train` or `dev`.
        source: what the user wrote.
        rows: of the file, those left out later included.
        form: its format, in words.
        unused: columns that are neither text nor label.
    """

    role: str
    source: str
    rows: int
    form: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Understood:
    """Files, and why the task is what it is."""

    files: tuple[FileRead, ...] = ()
    why_kind: str = ""
    why_metric: str = ""


@dataclass(frozen=True)
class TaskData:
    """A task with its splits, which share no text.

    Attributes:
        spec: the task.
        train: rows to train on.
        score: held out of train; scores candidates.
        select: held out of train; chooses checkpoints.
        dev: only ever reported.
        text: documents for warm-up distillation; none of them is a text of score, select or dev.
        notes: one line for each thing done to the data, for the log and the report.
        further: further splits that are only reported, by name (MNLI's mismatched dev).
        prepared: folders `ffnas prepare` wrote, which then take the place of `text`.
        stride: tokens by which windows of a long context overlap; None: a quarter of a sequence.
        understood: what was made of the files, for `engine.data.describe`.
        text_sources: documents of each source of text, in their order; () where they count as one.
    """

    spec: TaskSpec
    train: Rows
    score: Rows
    select: Rows
    dev: Rows
    text: list[str]
    notes: tuple[str, ...] = ()
    further: Mapping[str, Rows] = field(default_factory=dict)
    prepared: tuple[str, ...] = ()
    stride: int | None = None
    understood: Understood = field(default_factory=Understood)
    text_sources: tuple[int, ...] = ()

    def encode(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        text_length: int | None = None,
        max_positions: int | None = None,
        published: bool = False,
    ) -> EncodedTask:
        """Tokenize every split; see `engine.data.encode_task`, `encode_text` and `load_prepared`."""
        from engine.data.dataset import join
        from engine.data.encode import encode_task
        from engine.data.shards import load_prepared
        from engine.data.text import encode_text

        def encoded(rows: Rows) -> EncodedDataset:
            return encode_task(
                rows,
                self.spec,
                tokenizer,
                max_length,
                max_positions=max_positions,
                stride=self.stride,
                published=published,
            )

        splits = {name: encoded(getattr(self, name)) for name in ("train", "score", "select", "dev")}
        further = {name: encoded(rows) for name, rows in self.further.items()}
        text: EncodedDataset | ShardedText
        if self.prepared:
            text = load_prepared(self.prepared, tokenizer, max_positions=max_positions)
        else:
            length, counts = text_length or max_length, self.text_sources
            ends = list(accumulate(counts if sum(counts) == len(self.text) else (len(self.text),)))
            sources = [self.text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            parts = [encode_text(documents, tokenizer, length, max_positions=max_positions) for documents in sources]
            text = join(parts)
        return EncodedTask(self.spec, text=text, further=further, **splits)


@dataclass(frozen=True)
class EncodedTask:
    """The splits of `TaskData`, tokenized."""

    spec: TaskSpec
    train: EncodedDataset
    score: EncodedDataset
    select: EncodedDataset
    dev: EncodedDataset
    text: EncodedDataset | ShardedText
    further: Mapping[str, EncodedDataset] = field(default_factory=dict)
