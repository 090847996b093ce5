"""Tables and documents from files (`engine.data.readers`) and from the hub (`datasets`).

Values are taken as they are written. What is no text (a list, bytes, a date) is refused where a text is wanted, rather
than spelled as Python would.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from engine.data.columns import find_text_columns
from engine.data.filechecks import check_encoding
from engine.data.readers import SUFFIXES, Reading, read_columns
from engine.errors import UserError

MANIFEST = "manifest.json"
"""What a folder that `ffnas prepare` wrote holds."""

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
        rows: how many there are.
        form: the format in words.
        class_names: names of the classes of columns whose ids have names (Parquet and hub data sets).
        data: values by column name: lists, or a `datasets.Dataset`.
        notes: what had to be mended in the file.
        first: number of the first row, where these are a part of the file's rows.
    """

    source: str
    columns: tuple[str, ...]
    rows: int
    form: str
    class_names: Mapping[str, tuple[str, ...]]
    data: Any
    notes: tuple[str, ...] = ()
    first: int = 1

    def __len__(self) -> int:
        return self.rows

    def values(self, column: str) -> list[Any]:
        """Raw values of a column; class ids with names come as the names (-1 stays -1)."""
        values = list(self.data[column][:])
        names = self.class_names.get(column)
        return values if names is None else [names[v] if v is not None and 0 <= v < len(names) else v for v in values]

    def texts(self, column: str) -> list[str]:
        """A column as text; a missing value is the empty string.

        Raises:
            UserError: a value that is no text, with its row and what to do.
        """
        values = self.data[column][:]
        numbered = enumerate(values, start=self.first)
        return [v if isinstance(v, str) else text_of(v, self.source, column, row) for row, v in numbered]


def text_of(value: Any, where: str, column: str, row: int) -> str:
    """One value of a text column as text; see `Table.texts`."""
    if value is None or value != value:
        return ""
    problem = not_a_word(value)
    if problem is not None:
        raise UserError(f"{where}, data row {row}: text column {column!r} holds {problem}")
    return as_text(value)


def as_text(value: Any) -> str:
    """Text of a word or number as its file would write it: JSON's `true`, not Python's `True`."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def not_a_word(value: Any) -> str | None:
    """What is wrong with a value where a text or a label is wanted, and the remedy; None for text and numbers."""
    if isinstance(value, (str, int, float, Decimal)):
        return None
    if isinstance(value, (bytes, bytearray, memoryview)):
        return (
            "bytes, not text: write it as text first (pandas: df[column].str.decode('utf-8')), or name another column"
        )
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(repr, list(value)[:3]))}, not text: write one of its fields as a column"
    if isinstance(value, Sequence) or hasattr(value, "tolist"):
        return "a list, not text: join its parts, write one row for each, or name another column"
    return f"a {type(value).__name__}, not text: write it as text, or name another column"


def read_table(
    source: str, *, encoding: str = "utf-8", quoting: str = "standard", delimiter: str = "auto", split: str = "train"
) -> Table:
    """Read a table from a file or the hub.

    Args:
        source: path ending in .csv, .tsv, .jsonl, .json or .parquet, or NAME[:CONFIG][@SPLIT] on the hub.
        encoding: of text formats.
        quoting: `standard` or `none`; see `DataConfig.quoting`.
        delimiter: of CSV and TSV files; see `DataConfig.delimiter`.
        split: hub split when `source` names none.

    Raises:
        UserError: not found, not readable, or without rows; with file, place and remedy.
    """
    path = local_path(source)
    if path is None:
        return _read_hub(source, split)
    require_table(path, source)
    read = read_columns(path, Reading(encoding, quoting, delimiter))
    return Table(source, tuple(read.data), read.rows, read.form, read.class_names, read.data, read.notes)


def require_table(path: Path, source: str) -> None:
    """Raise `UserError` unless the suffix of `path` is that of a table."""
    suffix = path.suffix.casefold()
    if suffix not in SUFFIXES:
        raise UserError(f"{source}: cannot read a {suffix or 'file without suffix'}: use one of {', '.join(SUFFIXES)}")


def read_documents(
    source: str,
    *,
    encoding: str = "utf-8",
    quoting: str = "standard",
    delimiter: str = "auto",
    text_columns: Sequence[str] | None = None,
) -> list[str]:
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
        table = read_table(source, encoding=encoding, quoting=quoting, delimiter=delimiter)
        columns = document_columns(table.columns, text_columns, source)
        documents = [text for column in columns for text in table.texts(column)]
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise UserError(f"{source}: no text in it: give a file with text in data.text, or leave it out")
    return documents


def document_columns(columns: Sequence[str], wanted: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The wanted columns where the table has them all (the task's table may have others), else those known by name."""
    if wanted and set(wanted) <= set(columns):
        return tuple(wanted)
    return find_text_columns(columns, None, where)


def split_documents(text: str) -> list[str]:
    """Documents of a plain text; see `read_documents`. Lines end at newlines (and carriage returns) alone, as they do
    for `engine.data.stream`: a form feed, U+0085 or U+2028 is part of its line."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
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


def _table(source: str, data: Any) -> Table:
    if len(data) == 0:
        raise UserError(f"{source}: no rows: give data with at least one row")
    names = {c: tuple(f.names) for c, f in data.features.items() if hasattr(f, "names") and hasattr(f, "int2str")}
    return Table(source, tuple(data.column_names), len(data), "hub", names, data)


def is_prepared(source: str) -> bool:
    """Whether `source` is a folder of text that `ffnas prepare` wrote."""
    return (Path(source).expanduser() / MANIFEST).is_file()


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
