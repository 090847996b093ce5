"""Documents of large sources, one after the other, without holding the source in memory.

The same documents, in the same order, as `engine.data.sources.read_documents` gives; hub data sets are streamed.

Rejected: converting every source to one format first; Wikipedia would be written to the disk twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.data.filechecks import check_encoding
from engine.data.readers import SUFFIXES, Reading, csv_rows, delimiter_of, json_rows, open_parquet
from engine.data.sources import (
    HUB_NAME,
    Table,
    document_columns,
    document_style,
    iter_documents,
    local_path,
    quiet_datasets,
    require_table,
    text_of,
)
from engine.errors import UserError

_BATCH = 1024
"""Rows turned into texts at a time."""


def stream_documents(
    source: str,
    *,
    encoding: str = "utf-8",
    quoting: str = "standard",
    delimiter: str = "auto",
    text_columns: Sequence[str] | None = None,
    join: int = 1,
    skip: int = 0,
) -> Iterator[str]:
    """Documents that are not empty.

    Args:
        source: a .txt file, a table (.csv, .tsv, .jsonl, .json, .parquet), or NAME[:CONFIG][@SPLIT] on the hub.
        encoding, quoting, delimiter: of text formats, see `DataConfig`.
        text_columns: of a table; found by name where it has none of these names.
        join: rows of a table or hub data set that make one document, for corpora of one sentence a row.
        skip: documents to leave out at the beginning.

    Raises:
        UserError: not found or not readable.
    """
    path = local_path(source)
    if path is not None and path.suffix.casefold() == ".txt":
        encoding = check_encoding(path, encoding)
        with open(path, encoding=encoding, newline=None) as file:
            style = document_style(file)
            file.seek(0)
            yield from itertools.islice(iter_documents(file, style), skip, None)
        return
    if path is None:
        texts = _hub_texts(source, skip * join, text_columns)
    else:
        require_table(path, source)
        texts = itertools.islice(
            _local_texts(path, Reading(encoding, quoting, delimiter), text_columns), skip * join, None
        )
    while True:
        group = list(itertools.islice(texts, join))
        if not group:
            return
        document = "\n".join(text for text in group if text.strip())
        yield document  # an empty one too: documents are counted for resuming


def _local_texts(path: Path, reading: Reading, wanted: Sequence[str] | None) -> Iterator[str]:
    """Text of each row of a local table."""
    columns, rows = _local_rows(path, reading)
    chosen = document_columns(columns, wanted, str(path))
    done = 0
    while batch := list(itertools.islice(rows, _BATCH)):
        data = {name: [row.get(name) for row in batch] for name in chosen}
        part = Table(str(path), chosen, len(batch), "", {}, data, first=done + 1)
        for texts in zip(*(part.texts(name) for name in chosen), strict=True):
            yield "\n".join(texts)
        done += len(batch)


def _local_rows(path: Path, reading: Reading) -> tuple[Sequence[str], Iterator[dict[str, Any]]]:
    """Column names of a local table (of JSON: those of its first row) and its rows."""
    kind = SUFFIXES[path.suffix.casefold()]
    if kind == "parquet":
        file = open_parquet(path)
        return file.schema_arrow.names, (row for batch in file.iter_batches(_BATCH) for row in batch.to_pylist())
    encoding = check_encoding(path, reading.encoding)
    if kind == "csv":
        rows = csv_rows(path, encoding, delimiter_of(path, encoding, reading), reading.quoting)
        header = next(rows)
        return header, (dict(zip(header, row, strict=True)) for row in rows)
    found = (row for row, _ in json_rows(path, encoding))
    first = next(found, None)
    if first is None:
        raise UserError(f"{path}: no rows: give data with text")
    return list(first), itertools.chain([first], found)


def _hub_texts(source: str, skip: int, wanted: Sequence[str] | None) -> Iterator[str]:
    import datasets

    match = HUB_NAME.fullmatch(source)
    assert match is not None
    with quiet_datasets():
        try:
            data = datasets.load_dataset(
                match["name"], name=match["config"], split=match["split"] or "train", streaming=True
            )
            first = next(iter(data), None)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{source}: not readable ({reason}): check the path, or name and network") from error
        if first is None:
            raise UserError(f"{source}: no rows: give data with text")
        chosen = document_columns(list(first), wanted, source)
        for number, row in enumerate(data.skip(skip), start=skip + 1):
            yield "\n".join(text_of(row[column], source, column, number) for column in chosen)
