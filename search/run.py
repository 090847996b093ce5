"""`python -m search.run`, equal to `ffnas search`: read the configuration, prepare, run, say where the results are.

`torchrun --nproc-per-node N -m search.run ...` trains supernets and the found model on N devices together
(`engine.training.parallel`) and divides candidates among them (`search.ledger.board`). With `--ledger URL`, other
processes may help (`search.commands.join`).

Only the first rank has the run directory; the others are given an empty one in the temporary folder, so that nothing
they do can reach the run's files.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.data import TaskData
    from engine.training.parallel import Ranks
    from search.config.schema import SearchConfig
    from search.console.progress import Reporter


def command(argv: list[str]) -> None:
    """Runs, resumes or resolves a search, or tells how to; raises `UserError` before anything is written when the input
    is wrong."""
    from engine.errors import ToldElsewhere, UserError
    from search.commands.finished_run import is_finished
    from search.config.help import asked_for_help, search_help
    from search.config.inputs import read_inputs
    from search.config.options import parse, parse_resolve
    from search.console.progress import is_first, reporter_of_rank

    if asked_for_help(argv):
        print(search_help(argv))
        return
    with reporter_of_rank() as reporter:
        given = parse_resolve(argv)
        if given is not None:
            _resolve(*given, reporter)
            return
        try:
            config, resume = parse(argv)
            if is_finished(resume, config.files):
                return
            reporter.doing("reading the data")
            task = read_inputs(config)  # mistakes in files are told before frameworks are loaded
        except UserError as error:
            if is_first():
                raise
            raise ToldElsewhere(str(error)) from error

        reporter.doing("loading PyTorch")
        import torch

        from engine.training.parallel import join
        from search.restart import continued

        read = config.data
        with join(cuda=config.device != "cpu" and torch.cuda.is_available()) as ranks:
            if resume is None and ranks.size > 1:
                config, resume = continued(config, argv, ranks)
            _search(config, resume, ranks, argv, reporter, task if config.data == read else None)


def _resolve(folder: Path, config: SearchConfig, reporter: Reporter) -> None:
    from search.console.libraries import quiet

    reporter.doing("loading the libraries")
    quiet()
    if config.strategy == "inherit":
        from search.commands.resolve_inherited import resolve_inherited as resolve
    else:
        from search.commands.resolve import resolve
    resolve(folder, config, reporter)


def _search(
    config: SearchConfig,
    resume: Path | None,
    ranks: Ranks,
    argv: list[str],
    reporter: Reporter,
    task: TaskData | None = None,
) -> None:
    from search.config.options import placed, save_config
    from search.console.libraries import quiet
    from search.context import Context, agree_on, prepare
    from search.inherit.strategy import check
    from search.ledger.copy import open_ledger
    from search.ledger.ledger import Ledger
    from search.pipeline import run
    from search.restart import sign
    from search.rundir import LATENCY_TABLE, RunDir, default_name
    from search.tracking import open_scalars

    quiet()
    if resume is not None and (resume / LATENCY_TABLE).is_file():
        config.objectives.latency_table = str(resume / LATENCY_TABLE)
    shared = ranks.together(lambda: Ledger(config.ledger, run=config.name) if config.ledger else None)
    prepared = ranks.together(lambda: prepare(config, reporter, ranks, task))
    agree_on(prepared)
    config = prepared.config = placed(prepared.config)
    if config.strategy == "inherit":
        check(prepared)
    path = resume or Path(config.runs) / (config.name or default_name(config.preset, config.runs))
    with contextlib.ExitStack() as stack:
        if ranks.is_first:
            opened = ranks.first(lambda: stack.enter_context(RunDir(path).open(resume=resume is not None)))
            assert opened is not None
            rundir = opened
        else:
            ranks.first(lambda: None)
            elsewhere = stack.enter_context(tempfile.TemporaryDirectory(prefix="ffnas-rank-"))
            rundir = stack.enter_context(RunDir(elsewhere).open())
        if resume is None and ranks.is_first:
            sign(rundir, argv)
            save_config(config, rundir.config)
            table = prepared.space.limits.costs.table if prepared.space.limits is not None else None
            if table is not None:
                table.save(rundir.path / LATENCY_TABLE)
        ledger = open_ledger(rundir.ledger, stack, reporter.info) if shared is None else stack.enter_context(shared)
        scalars = open_scalars(config, rundir.path, reporter.info) if ranks.is_first else None
        if scalars is not None:
            stack.callback(scalars.close)
        reporter.info(f"run directory: {rundir.path}")
        for note in idle(config, ranks.size):
            reporter.info(note)
        run(Context(**vars(prepared), rundir=rundir, ledger=ledger, reporter=reporter, scalars=scalars))
    reporter.info(f"model:  {rundir.model}")
    reporter.info(f"report: {rundir.report}")


def idle(config: SearchConfig, processes: int) -> list[str]:
    """One line per stage that has fewer candidates at a time than there are processes."""
    notes = []
    for stage, together in (
        ("stage1", config.stage1.population),
        ("stage2", config.stage2.population),
        ("stage3", config.stage3.together),
    ):
        settings = getattr(config, stage)
        whole = (stage == "stage3" and config.stage3.race > 1) or (stage != "stage3" and settings.rungs > 0)
        units = config.sampler.concurrent * (1 if whole else together)
        if units < processes:
            notes.append(
                f"{stage}: {processes} processes, but work for {units} at a time:"
                f" raise sampler.concurrent to {-(-processes * config.sampler.concurrent // units)} or more"
            )
    return notes


if __name__ == "__main__":
    from search.cli import guarded

    sys.exit(guarded(command, sys.argv[1:]))
