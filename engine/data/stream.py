"""Documents of large sources, one after the other, without holding the source in memory.

The same documents, in the same order, as `engine.data.sources.read_documents` gives; hub data sets are streamed.

Rejected: converting every source to one format first; Wikipedia would be written to the disk twice.
"""

from __future__ import annotations

import csv
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.columns import find_text_columns
from engine.data.filechecks import check_csv, check_encoding
from engine.data.sources import HUB_NAME, SUFFIXES, document_style, iter_documents, local_path, quiet_datasets
from engine.errors import UserError


def stream_documents(source: str, *, encoding: str = "utf-8", join: int = 1, skip: int = 0) -> Iterator[str]:
    """Documents that are not empty.

    Args:
        source: a .txt file, a table (.csv, .tsv, .jsonl, .json, .parquet), or NAME[:CONFIG][@SPLIT] on the hub.
        encoding: of text formats.
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
    rows = _csv_rows(path, encoding) if path is not None and _is_csv(path) else _dataset_rows(source, path, skip * join)
    texts = rows if path is None or not _is_csv(path) else itertools.islice(rows, skip * join, None)
    while True:
        group = list(itertools.islice(texts, join))
        if not group:
            return
        document = "\n".join(text for text in group if text.strip())
        yield document  # an empty one too: documents are counted for resuming


def _is_csv(path: Path) -> bool:
    return SUFFIXES.get(path.suffix.casefold()) == "csv"


def _csv_rows(path: Path, encoding: str) -> Iterator[str]:
    encoding = check_encoding(path, encoding)
    delimiter = "\t" if path.suffix.casefold() == ".tsv" else ","
    columns, _ = check_csv(path, encoding, delimiter, csv.QUOTE_MINIMAL)
    wanted = find_text_columns(columns, None, str(path))
    with open(path, encoding=encoding, newline="") as file:
        for row in csv.DictReader(file, delimiter=delimiter):
            yield "\n".join(row[column] for column in wanted)


def _dataset_rows(source: str, path: Path | None, skip: int) -> Iterator[str]:
    import datasets

    options: dict[str, Any]
    if path is None:
        match = HUB_NAME.fullmatch(source)
        assert match is not None
        name, options = match["name"], {"name": match["config"], "split": match["split"] or "train"}
    else:
        suffix = path.suffix.casefold()
        if suffix not in SUFFIXES:
            raise UserError(
                f"{source}: cannot read a {suffix or 'file without suffix'}: use .txt, .jsonl, .parquet, ..."
            )
        name, options = SUFFIXES[suffix], {"data_files": glob.escape(str(path.resolve())), "split": "train"}
    with quiet_datasets():
        try:
            data = datasets.load_dataset(name, streaming=True, **options)
            first = next(iter(data), None)
        except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{source}: not readable ({reason}): check the path, or name and network") from error
        if first is None:
            raise UserError(f"{source}: no rows: give data with text")
        wanted = find_text_columns(list(first), None, source)
        for row in data.skip(skip):
            yield "\n".join(str(row[column] or "") for column in wanted)
