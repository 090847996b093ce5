"""Weights of a search that this process helps (`ffnas join`): waited for, then read from that search's folder."""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from engine.training.checkpoint import Damaged, load_weights
from search.console.progress import Reporter
from search.finished import RunFinished, summary_of

NOTICE = 600.0
"""Seconds between two lines that say what a worker waits for."""


def load_awaited(run: Path, name: str | Path, model: nn.Module, reporter: Reporter) -> None:
    """Waits until the search in the folder `run` has written the weights file `name`, and loads it into `model`.

    Raises:
        RunFinished: the search has ended meanwhile, and needs no help.
    """
    path, since = run / name, time.monotonic()
    while not path.exists():
        if summary_of(run) is not None:
            raise RunFinished
        if time.monotonic() - since > NOTICE:
            since = time.monotonic()
            reporter.info(f"waiting for {path}, which the search is to write")
        time.sleep(1.0)
    try:
        load_weights(path, model)
    except Damaged as error:
        if summary_of(run) is not None:  # which removed the file after we had seen it
            raise RunFinished from error
        raise
    model.eval()
