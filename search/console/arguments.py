"""argparse for the small subcommands, whose mistakes end in one line and exit code 2 like everybody's."""

from __future__ import annotations

import argparse
from typing import NoReturn

from engine.errors import UserError


class QuietParser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse on wrong input."""
        raise UserError(f"{message} (see {self.prog} --help)")
