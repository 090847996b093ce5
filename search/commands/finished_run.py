"""What `--resume` does with a run that has finished: next to nothing, and it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from search.console.progress import Reporter, is_first
from search.finished import remove_spent, summary_of
from search.rundir import RunDir


def is_finished(resume: Path | None, files: str) -> bool:
    """Whether the run that is to be resumed has finished; then it is closed, by the first process of several."""
    summary = None if resume is None else summary_of(resume)
    if resume is None or summary is None:
        return False
    if is_first():
        close(resume, files, summary)
    return True


def close(folder: Path, files: str, summary: dict[str, Any]) -> None:
    """Completes report and cleaning where a kill left them unfinished, and says that there is nothing to do.

    Args:
        folder: the run's directory.
        files: what of it stays (`search.finished`).
        summary: its summary.json.
    """
    from search.report import build_report

    reporter = Reporter()
    with RunDir(folder).open(resume=True) as rundir:
        if not rundir.report.is_file():
            build_report(rundir.path)
        remove_spent(rundir, files, reporter)
    reporter.info(f"{folder} has finished, nothing is left to do")
    verdict = summary.get("evidence", {}).get("verdict")
    if verdict:
        reporter.info(verdict)
    reporter.info(f"model:  {rundir.model}")
    reporter.info(f"report: {rundir.report}")
