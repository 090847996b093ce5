"""What the user says about data: one flat, typed dataclass that the command line fills in.

Chosen: a plain dataclass with one field per question and a docstring under each field, which jsonargparse turns into
`--data.FIELD` options and their help. Rejected: one nested group per split; options such as
`--data.splits.score.fraction` are longer to type and say no more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from engine.data.readers import parse_delimiter
from engine.data.task import heads
from engine.errors import UserError

MIN_LENGTH = 8
"""Shortest `max_length`: room for the special tokens of a pair and at least one token of each side."""

_BRACKETS = re.compile(r"\s*\[(.*)\]\s*", re.DOTALL)
_WORD = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,]*?))\s*(?:,|\Z)""")


def words(given: str) -> list[str]:
    """The words of a list written as text: `a,b`, `[a, b]` or `["a, b", 'c']`; never numbers or booleans."""
    inside = _BRACKETS.fullmatch(given)
    text = given if inside is None else inside[1]
    found, position = [], 0
    while position < len(text):
        match = _WORD.match(text, position)
        assert match is not None  # its last alternative takes anything up to a comma
        found.append(next(part for part in match.groups() if part is not None))
        position = match.end()
    return [word for word in found if word or inside is None]


@dataclass
class DataConfig:
    """Where the task and the warm-up text come from, and how they are split."""

    task: str | None = None
    """A published task: glue/cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli, squad, squad_v2, swag, race,
    race/middle or race/high; read from `dir`, otherwise from the hub. Left out: `train` says what the task is."""

    dir: str | None = None
    """Folder with published files as they are distributed: GLUE's TSV files in CoLA/, MNLI/, ..., SQuAD's JSON, SWAG's
    CSV, RACE's folders."""

    tasks: list[str] | str | None = None
    """Further published tasks a,b that stage 3's supernet is distilled on beside the task itself, from `dir` too, one
    task a step; each gets a teacher of its own."""

    train: str | None = None
    """Training data: a .csv, .tsv, .jsonl or .parquet file, or a hub data set as NAME[:CONFIG][@SPLIT] (split `train`
    when none is given). Left out: the embedded demo task."""

    dev: str | None = None
    """Data the final score is reported on, never used for a choice; same forms as `train` (hub split `validation` when
    none is given). Left out: held out of `train`."""

    text: list[str] | str | None = None
    """Text for warm-up distillation, one file or a list [a,b]: .txt (a blank line ends a document), any form `train`
    takes, with a text column, or folders that `ffnas prepare` wrote. Left out: the sentences of the training split.
    Strategy inherit: texts like those of the task that nobody has labelled; students learn the teacher's answers to
    them too (classification and regression of single texts)."""

    text_columns: list[str] | str | None = None
    """The column with the text, or two columns a,b for a pair. Left out: found by name."""

    label_column: str | None = None
    """The column with the label. Left out: found by name."""

    label_names: list[str] | str | None = None
    """The classes a,b,... in the order of their ids; the second of two is the positive one of F1. Left out: sorted."""

    drop_unlabelled: bool = False
    """Leave out rows without a label: empty, or marked as withheld (`-`, `-1`)."""

    kind: str = "auto"
    """What the label is: classification or regression. `auto`: regression when labels are numbers with decimals,
    otherwise classification."""

    metric: str = "auto"
    """The number that ranks models: accuracy, f1, mcc or neg_log_loss (classification), pearson or spearman
    (regression), f1 or exact_match (question answering). `auto`: the task's own where the path names a GLUE task,
    otherwise by kind."""

    encoding: str = "utf-8"
    """Character encoding of CSV, TSV, JSONL and text files, for example `latin-1`."""

    delimiter: str = "auto"
    """What separates the fields of CSV and TSV files: one character, or tab. `auto`: comma (in .tsv files tab), or
    semicolon, tab or bar where the file is cut by that instead."""

    quoting: Literal["standard", "none"] = "standard"
    """`none` reads quotation marks in CSV and TSV files as plain characters, as the published GLUE files need."""

    max_length: int = 128
    """Longest sequence in tokens, special tokens included; longer rows are cut."""

    stride: int | None = None
    """Question answering: tokens by which windows of a long context overlap. Left out: a quarter of `max_length`."""

    held_out: Literal["random", "last"] = "random"
    """Which rows are held out of the training data: `random` ones, every class its share, or the `last` ones of the
    file, score behind select."""

    score_fraction: float = 0.1
    """Part of the training data held out to score candidates."""

    select_fraction: float = 0.05
    """Part of the training data held out to choose checkpoints."""

    dev_fraction: float = 0.1
    """Part of the training data held out for the report when no `dev` is given."""

    min_held_out: int | None = None
    """Fewest rows of a held-out part (but never more than a quarter of the data); 300 when left out, or `max_held_out`
    where that is less."""

    max_held_out: int = 2000
    """Most rows of a held-out part."""

    max_train: int | None = None
    """Most training rows, a seeded sample; all when left out."""

    max_dev: int | None = None
    """Most rows of `dev`, a seeded sample; all when left out."""

    max_text: int | None = None
    """Most documents of warm-up text, a seeded sample; all when left out."""

    def __post_init__(self) -> None:
        """A single value where a list is meant becomes one; columns and names are cut at commas."""
        if isinstance(self.text, str):
            self.text = [self.text]
        for name in ("text_columns", "label_names", "tasks"):
            value = getattr(self, name)
            if isinstance(value, str):
                setattr(self, name, words(value))
        if self.label_column is not None and _BRACKETS.fullmatch(self.label_column):
            self.label_column = ",".join(words(self.label_column))

    def validate(self) -> None:
        """Check ranges and combinations.

        Raises:
            UserError: naming the field, its value and the remedy.
        """
        kinds = ("auto", *(head.kind for head in heads() if head.from_table))
        if self.kind not in kinds:
            raise UserError(f"data.kind {self.kind!r} is not known: choose one of {', '.join(kinds)}")
        metrics = ("auto", *dict.fromkeys(name for head in heads() for name in head.metrics))
        if self.metric not in metrics:
            raise UserError(f"data.metric {self.metric!r} is not known: choose one of {', '.join(metrics)}")
        if self.task is not None:
            self._validate_published()
        elif self.dir is not None or self.tasks:
            raise UserError("data.dir and data.tasks go with a published task: give --data.task too")
        if self.train is None and self.dev is not None and self.task is None:
            raise UserError(f"data.dev is {self.dev!r} but data.train is not given: give --data.train too")
        for name in ("text_columns", "label_column", "label_names"):
            if self.train is None and self.task is None and getattr(self, name) is not None:
                raise UserError(f"data.{name} is given but data.train is not: give --data.train too")
        for name in ("score_fraction", "select_fraction", "dev_fraction"):
            value = getattr(self, name)
            if not 0.0 < value < 0.5:
                raise UserError(f"data.{name} is {value}: choose a fraction above 0 and below 0.5")
        if self.score_fraction + self.select_fraction + self.dev_fraction > 0.75:
            raise UserError("data.score_fraction, select_fraction and dev_fraction together hold out more than 3/4")
        parse_delimiter(self.delimiter)
        if self.max_length < MIN_LENGTH:
            raise UserError(f"data.max_length is {self.max_length}: choose at least {MIN_LENGTH} tokens")
        for name in ("min_held_out", "max_held_out", "max_train", "max_dev", "max_text"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}: choose at least 1")
        if self.min_held_out is not None and self.min_held_out > self.max_held_out:
            raise UserError(
                f"data.min_held_out is {self.min_held_out}, above data.max_held_out {self.max_held_out}: swap them"
            )
        if self.text_columns is not None and len(self.text_columns) not in (1, 2):
            raise UserError(f"data.text_columns names {len(self.text_columns)} columns: give one, or two for a pair")

    def _validate_published(self) -> None:
        """Check the options that go with `task`."""
        from engine.data.catalog import published

        task = published(str(self.task))
        if "train" not in task.files:
            raise UserError(f"data.task {self.task!r} has no training data: choose glue/mnli, and predict it with that")
        for name in ("text_columns", "label_column", "label_names"):
            if getattr(self, name) is not None:
                raise UserError(f"data.{name} is given, but data.task {self.task!r} says what the columns are: drop it")
        if self.kind not in ("auto", task.kind):
            raise UserError(f"data.kind is {self.kind!r}, but data.task {self.task!r} is a {task.kind}: drop it")
        for name in self.tasks or ():
            other = published(name)
            if "train" not in other.files or not other.spec.head.pooled:
                raise UserError(f"data.tasks: {name!r} cannot be trained beside others: choose tasks of glue/")
            if name == self.task or (self.tasks or []).count(name) > 1:
                raise UserError(f"data.tasks: {name!r} is there twice (data.task is one of the tasks): name it once")
        if self.stride is not None and self.stride < 0:
            raise UserError(f"data.stride is {self.stride}: choose 0 or more")
