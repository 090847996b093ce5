"""`python -m search.run`, equal to `ffnas search`: read the configuration, prepare, run, say where the results are."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path


def command(argv: list[str]) -> None:
    """Runs or resumes a search; raises `UserError` before anything is written when the input is wrong."""
    from search.options import parse

    config, resume = parse(argv)

    from search.context import Context, prepare
    from search.ledger import Ledger
    from search.libraries import quiet
    from search.options import save_config
    from search.pipeline import run
    from search.progress import Reporter
    from search.rundir import RunDir, default_name
    from search.tracking import Scalars

    quiet()
    reporter = Reporter()
    prepared = prepare(config, reporter)
    config = prepared.config
    path = resume or Path(config.runs) / (config.name or default_name(config.preset, config.runs))
    with contextlib.ExitStack() as stack:
        rundir = stack.enter_context(RunDir(path).open(resume=resume is not None))
        if resume is None:
            save_config(config, rundir.config)
        ledger = stack.enter_context(Ledger(rundir.ledger))
        scalars = Scalars(rundir.path / "tensorboard") if config.tensorboard else None
        if scalars is not None:
            stack.callback(scalars.close)
        reporter.info(f"run directory: {rundir.path}")
        run(Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=reporter, scalars=scalars))
    reporter.info(f"model:  {rundir.model}")
    reporter.info(f"report: {rundir.report}")


if __name__ == "__main__":
    from search.cli import guarded

    sys.exit(guarded(command, sys.argv[1:]))
