"""`ffnas join runs/NAME`: a worker that helps a search which shares its ledger (`--ledger URL --name NAME`).

The worker reads the search's configuration and finished weights from its run directory, takes candidates from the
ledger, and leaves when no stage has any left. It writes nothing into the run directory, holds nothing others wait for,
and may come and go at any time. The search itself goes on without it, and may be resumed while workers wait for it.

Chosen: weights come from the run directory, which all machines see (a cluster's file system). Rejected: every worker
warms the supernet up by itself. It repeats the longest phase, and on another kind of device ends in other weights.
(Where there is no common folder that is still possible: start whole searches with the same options and ledger. The
ledger refuses one whose weights came out differently.)
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from search.config.schema import SearchConfig
    from search.console.progress import Reporter


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from engine.errors import UserError

        raise UserError(f"join: {message}: see ffnas join --help")


def _parse(argv: list[str]) -> tuple[SearchConfig, Path]:
    from engine.errors import UserError
    from search.config.checks import validate
    from search.config.options import parse

    parser = _Parser(prog="ffnas join", description="Help a search that shares its ledger with its candidates.")
    parser.add_argument("run", type=Path, help="run directory of the search")
    parser.add_argument(
        "--ledger", help="the search's ledger, where its URL needs a password or another host name here"
    )
    parser.add_argument("--device", help="'auto', 'cpu' or 'cuda[:N]' (default: the search's)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: the search's)")
    options = parser.parse_args(argv)
    config, _ = parse(["--resume", str(options.run)])
    given = {name: getattr(options, name) for name in ("ledger", "device", "threads") if getattr(options, name)}
    config = dataclasses.replace(config, **given)
    if config.ledger is None:
        raise UserError(
            f"join {options.run}: this search keeps its ledger to itself: start it with --ledger URL --name NAME"
        )
    validate(config)
    return config, options.run


def command(argv: list[str]) -> None:
    """Helps until there is nothing left to do; raises `UserError` when the input is wrong."""
    config, run = _parse(argv)
    from search.console.progress import Reporter
    from search.finished import summary_of

    if summary_of(run) is not None:
        Reporter().info(f"nothing left to do: the search in {run} has finished")
        return
    with Reporter() as reporter:
        reporter.doing("loading PyTorch")
        _help(config, run, reporter)
    reporter.info(f"nothing left to do: the search goes on in {run}")


def _help(config: SearchConfig, run: Path, reporter: Reporter) -> None:
    from search.console.libraries import quiet
    from search.context import Context, prepare
    from search.finished import RunFinished
    from search.ledger.ledger import Ledger
    from search.pipeline import help_out
    from search.rundir import LATENCY_TABLE, RunDir

    quiet()
    if (run / LATENCY_TABLE).is_file():
        config.objectives.latency_table = str(run / LATENCY_TABLE)
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger(config.ledger or "", run=config.name))
        prepared = prepare(config, reporter)
        elsewhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="ffnas-worker-"))
        rundir = stack.enter_context(RunDir(elsewhere).open())
        stack.enter_context(contextlib.suppress(RunFinished))
        help_out(Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=reporter, joined=run))


if __name__ == "__main__":
    from search.cli import guarded

    sys.exit(guarded(command, sys.argv[1:]))
