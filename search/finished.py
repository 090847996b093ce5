"""A finished run: how it is told from an interrupted one, and what of it stays.

With `files: models`, the default, what only resuming needed goes when all results are there: checkpoints, the supernets
that stages 1 and 2 start from, the weights of baselines, second copies. What stays is a few times the found model at
most: `ffnas report`, `export`, `predict` and `derive` need best/, predictions/, tables and logs; `--resolve` needs the
ledger and, of strategy paper, stage 3's supernet. `files: all` keeps everything.

A run is finished when summary.json, which is written after everything it tells of, is whole and best/model has the
weights it names. So a kill while files go leaves a finished run, and the next `--resume` ends the cleaning.

Rejected: weights of the baselines as models to keep. They are for comparison, and predictions/ has their answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.files import file_hash
from search.console.progress import Reporter
from search.rundir import RunDir

MODELS, ALL = "models", "all"
FILES = (MODELS, ALL)
"""Values of the configuration's `files`."""

_WEIGHTS = ("*.safetensors", ".*.safetensors.copy", "*.pt", "*.pt.previous")
"""Names of what training writes (`engine.training.checkpoint`)."""


class RunFinished(Exception):
    """The run that a worker helps, or is to help, has finished."""


def weights_hash(rundir: RunDir) -> str:
    """What summary.json says of the weights in best/model: their SHA-256."""
    return file_hash(rundir.model / "model.safetensors")


def summary_of(folder: Path) -> dict[str, Any] | None:
    """summary.json of a finished run; None where the run has not finished, or its model is damaged."""
    rundir = RunDir(folder)
    try:
        summary = json.loads(rundir.summary.read_text(encoding="utf-8"))
        if "weights" in summary and summary["weights"] != weights_hash(rundir):
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = all((rundir.model / name).is_file() for name in ("model.safetensors", "config.json"))
    return summary if whole and rundir.architecture.is_file() else None


def remove_spent(rundir: RunDir, files: str, reporter: Reporter) -> None:
    """Removes what a finished run no longer needs, and says how much that was; with `files: all` nothing."""
    if files == ALL:
        return
    spent = list(_spent(rundir))
    freed = sum(path.stat().st_size for path in spent)
    for path in spent:
        path.unlink(missing_ok=True)
    for folder in rundir.checkpoints.iterdir():
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if spent:
        reporter.info(f"removed what only resuming needs: {freed / 1e6:,.0f} MB (--files all keeps it)")


def _spent(rundir: RunDir) -> Iterator[Path]:
    kept = rundir.stage(3) / "supernet.safetensors"
    folders = (rundir.checkpoints, *map(rundir.stage, (1, 2, 3)))
    for folder in folders:
        for pattern in _WEIGHTS:
            yield from (path for path in folder.rglob(pattern) if path != kept and path.is_file())
