"""`python -m search.run`, equal to `ffnas search`: read the configuration, prepare, run, say where the results are."""

from __future__ import annotations

import sys


def command(argv: list[str]) -> None:
    """Runs or resumes a search; raises `UserError` before anything is written when the input is wrong."""
    from search.options import parse

    config, resume = parse(argv)

    import engine
    from engine.training import PhaseLog
    from search.context import Context, prepare
    from search.ledger import Ledger
    from search.options import save_config
    from search.pipeline import run
    from search.progress import Reporter
    from search.rundir import RunDir, default_name

    engine.compat.quiet_libraries()
    reporter = Reporter()
    prepared = prepare(config, reporter)
    if resume is None:
        config = prepared.config
        name = config.name or default_name(config.preset)
        rundir = RunDir.create(config.runs, name)
        save_config(config, rundir.config)
    else:
        rundir = RunDir.open(resume)
    with rundir:
        reporter.info(f"run directory: {rundir.path}")
        context = Context(**vars(prepared), rundir=rundir, ledger=Ledger(rundir.ledger), reporter=reporter)
        with _scalars(context):
            run(context)
    reporter.info(f"model:  {rundir.path / 'best' / 'model'}")
    reporter.info(f"report: {rundir.path / 'report.html'}")


if __name__ == "__main__":
    from search.cli import guarded

    sys.exit(guarded(command, sys.argv[1:]))
