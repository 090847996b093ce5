"""What was understood of the user's data, in a few lines shown before anything is trained.

    data    train reviews.csv: 4,812 rows (CSV separated by ';'); text: body; label: stars; not used: title, author
            dev   held out of train
            rows  3,900 train, 450 score, 240 select, 222 dev
            text  3,900 documents to distil on
    task    reviews: classification, since labels are words or whole numbers: 1: 412 (9 %), 2: 503 (10 %), ...
    metric  accuracy, the usual one for classes (--data.metric for another)
    length  median 21 tokens, 95 % up to 88, longest 512; 31 of 4,812 texts are cut at 48 (--data.max_length)
    note    12 duplicate training texts dropped ...

Needs no framework: `ffnas data` prints the same in a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.rows import Rows
from engine.data.task import TaskSpec
from engine.data.task_data import TaskData

MOST_MEASURED = 20_000
"""Texts whose lengths are counted: all of most tasks, spread evenly over larger ones."""

_MOST_COLUMNS = 12
_SPLITS = ("train", "score", "select", "dev")


def describe(task: TaskData, max_length: int, tokenizer: Any = None) -> list[str]:
    """The lines.

    Args:
        task: as `load_task` gives it.
        max_length: tokens to which texts are cut.
        tokenizer: a `transformers` or `tokenizers` one; lengths are in words when None.
    """
    spec, understood = task.spec, task.understood
    sizes = ", ".join(f"{len(getattr(task, name)):,} {name}" for name in _SPLITS)
    sizes += "".join(f", {len(rows):,} {name}" for name, rows in task.further.items())
    documents = ", ".join(task.prepared) if task.prepared else f"{len(task.text):,} documents"
    kind, metric = spec.kind.replace("_", " "), spec.metric
    kind += f", since {understood.why_kind}" if understood.why_kind else ""
    metric += f", {understood.why_metric}" if understood.why_metric else ""
    parts = {
        "data": [*_files(task), f"rows  {sizes}", f"text  {documents} to distil on"],
        "task": [f"{spec.name}: {kind}: {_labels(task)}"],
        "metric": [f"{metric} (--data.metric for another)"],
        "length": [_lengths(task, max_length, tokenizer)],
        "note": list(task.notes),
    }
    return [f"{'' if i else head:<7} {text}" for head, texts in parts.items() for i, text in enumerate(texts)]


def token_counts(columns: Sequence[Sequence[str]], tokenizer: Any) -> np.ndarray:
    """[N] int64 tokens of each text or pair, special tokens included, nothing cut."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "encode_batch_fast"):
        backend.no_truncation()
        backend.no_padding()
        inputs = list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))
        return np.array([len(e.ids) for e in backend.encode_batch_fast(inputs)], dtype=np.int64)
    ids = tokenizer(*map(list, columns), truncation=False, padding=False, verbose=False)["input_ids"]
    return np.array([len(row) for row in ids], dtype=np.int64)


def word_counts(columns: Sequence[Sequence[str]]) -> np.ndarray:
    """[N] int64 words of each text or pair."""
    counts = np.array([[len(text.split()) for text in column] for column in columns], dtype=np.int64)
    return np.asarray(counts.sum(axis=0))


def _files(task: TaskData) -> Iterator[str]:
    spec = task.spec
    for number, file in enumerate(task.understood.files):
        line = f"{file.role:<5} {file.source}: {file.rows:,} rows ({file.form})"
        if number == 0:
            line += f"; text: {', '.join(spec.text_columns)}; label: {spec.label_column}"
        if file.unused:
            line += f"; not used: {', '.join(file.unused[:_MOST_COLUMNS])}"
            line += f" and {len(file.unused) - _MOST_COLUMNS} more" if len(file.unused) > _MOST_COLUMNS else ""
        yield line
    if not any(file.role == "dev" for file in task.understood.files):
        yield "dev   held out of train (--data.dev for a file)"


def _labels(task: TaskData) -> str:
    """Classes with their counts over all splits, the range of a target, and the like."""
    return task.spec.head.describe_labels(task.spec, [getattr(task, name) for name in _SPLITS])


def _lengths(task: TaskData, max_length: int, tokenizer: Any) -> str:
    columns = _sampled([getattr(task, name) for name in _SPLITS], task.spec)
    lengths = np.max([_counted(texts, tokenizer) for texts in task.spec.head.sequences(columns)], axis=0)
    total = sum(len(getattr(task, name)) for name in _SPLITS)
    median, most = np.percentile(lengths, [50, 95], method="higher").astype(int).tolist()
    unit = "words" if tokenizer is None else "tokens"
    text = f"median {median} {unit}, 95 % up to {most}, longest {int(lengths.max())}"
    if len(lengths) < total:
        text += f" (of {len(lengths):,} rows)"
    if tokenizer is None:
        return f"{text}; texts are cut at {max_length} tokens (--data.max_length; --teacher NAME counts its tokens)"
    cut = int((lengths > max_length).sum())
    if task.spec.head.windows:
        return f"{text}; {cut:,} of {len(lengths):,} are read in windows of {max_length} (--data.max_length)"
    return f"{text}; {cut:,} of {len(lengths):,} are cut at {max_length} (--data.max_length)"


def _counted(columns: Sequence[Sequence[str]], tokenizer: Any) -> np.ndarray:
    return word_counts(columns) if tokenizer is None else token_counts(columns, tokenizer)


def _sampled(parts: Sequence[Rows], spec: TaskSpec) -> list[list[str]]:
    """Text columns of all splits together, at most `MOST_MEASURED` rows."""
    columns = [[text for rows in parts for text in rows.texts[i]] for i in range(len(spec.text_columns))]
    if len(columns[0]) <= MOST_MEASURED:
        return columns
    chosen = np.linspace(0, len(columns[0]) - 1, MOST_MEASURED).astype(np.int64).tolist()
    return [[column[i] for i in chosen] for column in columns]


def file_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder without transformers, None where it has no `tokenizer.json`."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.is_file() else None
