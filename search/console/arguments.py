"""argparse for the small subcommands, whose mistakes end in one line and exit code 2 like everybody's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from engine.errors import UserError


def add_reading_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how text files are written, under the names error messages recommend, too."""
    for name, default, meaning in (
        ("encoding", "utf-8", "character encoding of text files"),
        ("quoting", "standard", "none: quotation marks in CSV and TSV files are plain characters"),
        ("delimiter", "auto", "what separates the fields of CSV and TSV files: one character, or tab"),
    ):
        choices = ("standard", "none") if name == "quoting" else None
        parser.add_argument(f"--{name}", f"--data.{name}", default=default, choices=choices, help=meaning)
    parser.add_argument(
        *("--text-columns", "--text_columns", "--data.text_columns", "--data.text-columns"),
        metavar="A[,B]",
        help="text columns of a table (default: found by name)",
    )


def reading(options: argparse.Namespace) -> dict[str, str]:
    """What `add_reading_options` read, as keywords of `engine.data.sources.read_table`."""
    return {name: getattr(options, name) for name in ("encoding", "quoting", "delimiter")}


class QuietParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse on wrong input."""
        raise UserError(f"{message} (see {self.prog} --help)")
