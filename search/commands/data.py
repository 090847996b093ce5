"""`ffnas data FILE...`: what a search would understand of somebody's data, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HELP = """usage: ffnas data TRAIN [DEV] [options of ffnas search]

Shows in a second what a search would make of the files: columns, rows, classes, lengths, what is
cut or left out, task and metric. Nothing is trained or written.

examples:
  ffnas data reviews.csv
  ffnas data train.csv dev.csv --data.label_column stars
  ffnas data train.csv --teacher bert-base-uncased           lengths in its tokens instead of words
  ffnas data --data.task glue/cola --data.dir glue_data

Options are those of `ffnas search` (--help-all); --preset and --data.max_length say where texts are
cut."""


def command(argv: list[str]) -> None:
    """Prints the lines; raises `UserError` where a search would."""
    from engine.errors import UserError

    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(HELP)
        return
    files = []
    for word in argv:
        if word.startswith("-"):
            break
        files.append(word)
    options = argv[len(files) :]
    if len(files) > 2:
        raise UserError(f"data: {len(files)} files given: give training data, and dev data if there is some")
    named = [
        word for option, file in zip(("--data.train", "--data.dev"), files, strict=False) for word in (option, file)
    ]

    from engine.data.describe import describe
    from engine.data.load import load_task
    from search.config.options import parse

    config, _ = parse([*named, *options], prog="ffnas data")
    task = load_task(config.data, seed=config.seed)
    teacher = any(word.split("=")[0] == "--teacher" for word in options)
    for line in describe(task, config.data.max_length, _tokenizer(config.teacher) if teacher else None):
        print(line)


def _tokenizer(teacher: str) -> Any:
    from engine.data.describe import file_tokenizer
    from engine.model_sources import load_tokenizer, resolve

    source = resolve(teacher)
    return file_tokenizer(Path(source.folder)) or load_tokenizer(source)
