"""Tables and documents from files and from the hub, read through `datasets`.

Text files are checked first (`engine.data.filechecks`); then every column of a CSV or TSV file is read as text, exactly
as written ("NA" stays "NA", "1.0" stays "1.0"). Types are decided later, in `engine.data.labels`.

Chosen: `datasets` for every format, into memory, with a throw-away cache folder for local files. Rejected: its default
cache; a second copy of the user's file stays on the disk, and an edited file may be served stale.
"""

from __future__ import annotations

import csv
import glob
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.data.columns import find_text_columns
from engine.data.filechecks import bad_json_line, check_csv, check_encoding
from engine.errors import UserError

SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""File name suffixes of tables, and the builder that reads each."""

HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")
_WIKI_TITLE = re.compile(r"^ ?= [^=].*[^=] = ?$")
_BLANK = re.compile(r"^\s*$")
_WIKI_HEADING = re.compile(r"^ ?(= )+.*( =)+ ?$")


@dataclass(frozen=True)
class Table:
    """Columns of one source.

    Attributes:
        source: what the user wrote, for messages.
        columns: column names in file order.
        class_names: names of the classes of columns whose ids have names (Parquet and hub data sets).
        data: the `datasets.Dataset`, in memory for local files.
    """

    source: str
    columns: tuple[str, ...]
    class_names: dict[str, tuple[str, ...]]
    data: Any

    def __len__(self) -> int:
        return len(self.data)

    def values(self, column: str) -> list[Any]:
        """Raw values of a column; class ids with names come as the names (-1 stays -1)."""
        values = list(self.data[column][:])
        names = self.class_names.get(column)
        return values if names is None else [names[v] if v is not None and 0 <= v < len(names) else v for v in values]

    def texts(self, column: str) -> list[str]:
        """A column as text; a missing value is the empty string."""
        return ["" if v is None else v if isinstance(v, str) else str(v) for v in self.data[column][:]]


def read_table(source: str, *, encoding: str = "utf-8", quoting: str = "standard", split: str = "train") -> Table:
    """Read a table from a file or the hub.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .json or .parquet, or NAME[:CONFIG][@SPLIT] on the hub.
        encoding: of text formats.
        quoting: `standard` or `none`; see `DataConfig.quoting`.
        split: hub split when `source` names none.

    Raises:
        UserError: not found, not readable, or without rows; with file, place and remedy.
    """
    path = local_path(source)
    if path is None:
        return _read_hub(source, split)
    suffix = path.suffix.casefold()
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: cannot read a {suffix or 'file without suffix'}: use one of {', '.join(SUFFIXES)}")
    options: dict[str, Any] = {}
    rows = None
    if SUFFIXES[suffix] != "parquet":
        encoding = check_encoding(path, encoding)
        options["encoding"] = encoding
    if SUFFIXES[suffix] == "csv":
        delimiter = "\t" if suffix == ".tsv" else ","
        quote = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
        columns, rows = check_csv(path, encoding, delimiter, quote)
        options.update(sep=delimiter, quoting=quote, keep_default_na=False, features=columns)
    data = _load_local(path, SUFFIXES[suffix], options)
    if rows is not None and len(data) != rows:
        raise UserError(f"{source}: {rows} rows counted but {len(data)} read: look for stray quotation marks in it")
    return _table(source, data)


def read_documents(source: str, *, encoding: str = "utf-8", quoting: str = "standard") -> list[str]:
    """Documents of a .txt file, or one document per row of a table's text column.

    In a .txt file a blank line ends a document; in one without blank lines every line is a document; in WikiText
    files the titles (` = Title = `) begin a document and headings are left out.

    Raises:
        UserError: not found, not readable, or without text.
    """
    path = local_path(source)
    if path is not None and path.suffix.casefold() == ".txt":
        documents = split_documents(path.read_bytes().decode(check_encoding(path, encoding)))
    else:
        table = read_table(source, encoding=encoding, quoting=quoting)
        columns = find_text_columns(table.columns, None, source)
        documents = [text for column in columns for text in table.texts(column)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"{source}: no text in it: give a file with text in data.text, or leave it out")
    return documents


def split_documents(text: str) -> list[str]:
    """Documents of a plain text; see `read_documents`."""
    lines = text.splitlines()
    return list(iter_documents(lines, document_style(lines)))


def document_style(lines: Iterable[str]) -> Literal["wiki", "blank", "line"]:
    """How the lines of a plain text make documents: WikiText titles, blank lines, or each a document."""
    blank = False
    for line in lines:
        if line.startswith((" =", "=")) and _WIKI_TITLE.match(line.rstrip("\n")):
            return "wiki"
        blank = blank or not line.strip()
    return "blank" if blank else "line"


def iter_documents(lines: Iterable[str], style: Literal["wiki", "blank", "line"]) -> Iterator[str]:
    """Documents of a plain text, one after the other; never empty."""
    if style == "line":
        for line in lines:
            if line.strip():
                yield line.rstrip("\n")
        return
    starts, skipped = (_WIKI_TITLE, _WIKI_HEADING) if style == "wiki" else (_BLANK, _BLANK)
    document: list[str] = []
    for line in lines:
        line = line.rstrip("\n")
        if starts.match(line) and document:
            yield "\n".join(document)
            document = []
        if line.strip() and not skipped.match(line):
            document.append(line.strip())
    if document:
        yield "\n".join(document)


def local_path(source: str) -> Path | None:
    """The file `source` names, or None when it can only be a hub name."""
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{source} is a folder: give a file of it")
    if path.exists():
        return path
    known = path.suffix.casefold() in {*SUFFIXES, ".txt"}
    if known or source.startswith(("/", ".", "~")) or HUB_NAME.fullmatch(source) is None:
        raise UserError(f"{source}: no such file: check the path (working folder {Path.cwd()})")
    return None


def _read_hub(source: str, split: str) -> Table:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    match = HUB_NAME.fullmatch(source)
    assert match is not None
    with quiet_datasets():
        try:
            data = load_dataset(match["name"], match["config"], split=match["split"] or split)
        except (DatasetsError, OSError, ValueError) as error:
            reason = _first_line(error)
            raise UserError(
                f"{source}: neither a file here nor readable from the hub ({reason}): check the path, or name and "
                "network (HF_HUB_OFFLINE unset), or give a local file"
            ) from error
    return _table(source, data)


def _load_local(path: Path, builder: str, options: dict[str, Any]) -> Any:
    import datasets
    import pyarrow

    if isinstance(options.get("features"), tuple):
        options["features"] = datasets.Features({name: datasets.Value("string") for name in options["features"]})
    with quiet_datasets(), tempfile.TemporaryDirectory(prefix="ffnas-data-") as cache:
        try:
            return datasets.load_dataset(
                builder,
                data_files=glob.escape(str(path.resolve())),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
        except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
            if path.stat().st_size == 0 or "corresponds to no data" in str(error):
                raise UserError(f"{path}: the file has no rows: give one with data") from error
            place = bad_json_line(path, options["encoding"]) if builder == "json" else ""
            reason = _first_line(error.__cause__ or error)
            raise UserError(
                f"{path}: not readable as {path.suffix[1:]} ({place or reason}): correct the file"
            ) from error


def _table(source: str, data: Any) -> Table:
    if len(data) == 0:
        raise UserError(f"{source}: no rows: give data with at least one row")
    names = {c: tuple(f.names) for c, f in data.features.items() if hasattr(f, "names") and hasattr(f, "int2str")}
    return Table(source, tuple(data.column_names), names, data)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """No progress bars, no log lines besides our one error, and no download counting, while `datasets` reads."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [log.level for log in loggers], datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    for log in loggers:
        log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for log, level in zip(loggers, before[0], strict=True):
            log.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before[1]
        if not bars:
            datasets.enable_progress_bars()
