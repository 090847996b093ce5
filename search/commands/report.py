"""`ffnas report RUN`: build the report of a run directory again."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


def command(argv: list[str]) -> None:
    """Builds report.html and the plots of one run directory from its files."""
    if argv in (["-h"], ["--help"]):
        print("usage: ffnas report RUN\n\nBuilds report.html and plots/ of the run directory RUN again.")
        return
    if len(argv) != 1:
        raise UserError(f"report takes one run directory, got {len(argv)} arguments: ffnas report runs/NAME")
    from search.console.progress import Reporter

    with Reporter() as reporter:
        reporter.doing("drawing the report")
        from search.report import build_report  # not above: seconds that help and mistakes do without

        reporter.info(f"report: {build_report(Path(argv[0]))}")
