"""Files of words and tags as a task: which tags there are, what scheme they are in, what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.data.read_tags import Sentence, read_sentences
from engine.data.rows import Rows
from engine.data.tags import UNTAGGED, Tags, are_entities, as_bio, bio_names, entities_of, scheme_of
from engine.data.task import TaskSpec
from engine.data.task_data import FileRead, Understood
from engine.errors import UserError

KINDS = ("tokens", "tokens_crf")
MOST_TYPES = 12
"""That are counted in a line about the data."""


def load_tags(config: Any, notes: list[str]) -> tuple[TaskSpec, Rows, Rows | None, Understood]:
    """The task, its training sentences, those of the dev file if any, and what was made of the files.

    Training sentences without any tag take part: students learn the teacher's answers to them.

    Args:
        config: an `engine.data.config.DataConfig`.
        notes: a line for each thing done is added.

    Raises:
        UserError: a file does not fit, or the options do not.
    """
    kind = "tokens" if config.kind == "auto" else config.kind
    if kind not in KINDS:
        raise UserError(f"data.kind is {kind!r}, but {config.train} holds words with tags: choose tokens or tokens_crf")
    train = read_sentences(config.train, config.encoding)
    dev = None if config.dev is None else read_sentences(config.dev, config.encoding)
    given = [s.tags for s in (*train, *(dev or ())) if s.tags is not None]
    if not given or all(s.tags is None for s in train):
        raise UserError(f"{config.train}: its words have no tags: write a tag in the last column")
    entities = are_entities(tag for tags in given for tag in tags)
    if entities:
        train = _in_bio(train, notes)
        dev = None if dev is None else _in_bio(dev, notes)
    names = _names(config, train, dev, entities)
    metric, why = config.metric, "data.metric says so"
    if metric == "auto":
        metric, why = ("f1", "the usual one for entities") if entities else ("accuracy", "the usual one for tags")
    spec = TaskSpec(_name(config.train), kind, ("words",), "tags", names, metric)
    files = [FileRead("train", config.train, len(train), "words and tags")]
    rows, dev_rows = rows_of(train, spec, config.train), None
    if dev is not None:
        dev_rows = rows_of(dev, spec, str(config.dev))
        if any(tag < 0 for gold in dev_rows.golds or () for tag in gold.ids):
            raise UserError(f"{config.dev}: a sentence of it has no tags: the score needs all of them")
        files.append(FileRead("dev", config.dev, len(dev), "words and tags"))
    return spec, rows, dev_rows, Understood(tuple(files), "the file holds a tag for every word", why)


def rows_of(sentences: Sequence[Sentence], spec: TaskSpec, where: str) -> Rows:
    """Sentences as rows of texts, and `Tags` where one has tags.

    Raises:
        UserError: a tag is none of the task's.
    """
    ids = {name: number for number, name in enumerate(spec.label_names)}
    golds = []
    for number, (words, tags) in enumerate(sentences, start=1):
        for tag in tags or ():
            if tag not in ids:
                raise UserError(
                    f"{where}: sentence {number}: tag {tag!r} is none of {', '.join(spec.label_names)}: correct the"
                    " file, or name all tags with --data.label_names"
                )
        golds.append(Tags((UNTAGGED,) * len(words) if tags is None else tuple(ids[tag] for tag in tags)))
    has_tags = any(s.tags is not None for s in sentences)
    return Rows(([" ".join(s.words) for s in sentences],), golds=golds if has_tags else None)


def asked_rows(source: str, spec: TaskSpec, encoding: str) -> Rows:
    """Sentences of a file that a model is asked about; tags that it has are compared with the answers."""
    sentences = read_sentences(source, encoding)
    tags = [s.tags for s in sentences if s.tags is not None]
    if are_entities(spec.label_names):
        if not are_entities(tag for row in tags for tag in row):
            return rows_of([s._replace(tags=None) for s in sentences], spec, source)
        sentences = _in_bio(sentences, [])
    elif tags and not {tag for row in tags for tag in row} <= set(spec.label_names):
        sentences = [s._replace(tags=None) for s in sentences]
    return rows_of(sentences, spec, source)


def told_tags(spec: TaskSpec, parts: Iterable[Rows]) -> str:
    """Sentences, words and entities of each type, or tags, in a line."""
    counts: Counter[str] = Counter()
    sentences = words = untagged = 0
    spells = are_entities(spec.label_names)
    for rows in parts:
        sentences += len(rows)
        words += sum(text.count(" ") + 1 for text in rows.texts[0])
        for gold in rows.golds or ():
            tags = [spec.label_names[tag] for tag in gold.ids if tag >= 0]
            untagged += not tags
            counts.update((kind for kind, _, _ in entities_of(tags)) if spells else tags)
    most = counts.most_common(MOST_TYPES)
    each = ", ".join(f"{kind}: {count:,}" for kind, count in most)
    more = f" and {len(counts) - len(most)} more" if len(counts) > len(most) else ""
    left = f"; {untagged:,} sentences without tags" if untagged else ""
    return f"{sentences:,} sentences, {words:,} words; {each}{more}{left}"


def _in_bio(sentences: Sequence[Sentence], notes: list[str]) -> list[Sentence]:
    scheme = scheme_of(s.tags for s in sentences if s.tags is not None)
    if scheme != "BIO":
        notes.append(f"tags are {scheme} and were turned into BIO")
    return [s if s.tags is None else s._replace(tags=as_bio(s.tags)) for s in sentences]


def _names(config: Any, train: Sequence[Sentence], dev: Sequence[Sentence] | None, entities: bool) -> tuple[str, ...]:
    if config.label_names:
        return tuple(config.label_names)
    tags = {tag for s in (*train, *(dev or ())) for tag in s.tags or ()}
    return bio_names(tag[2:] for tag in tags if tag != "O") if entities else tuple(sorted(tags))


def _name(source: str) -> str:
    return Path(source).stem or "tags"
