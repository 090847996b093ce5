"""Reports: what a run found, from the files of its run directory alone."""

from __future__ import annotations

from search.report.build import build_report

__all__ = ["build_report"]
