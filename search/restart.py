"""Restarts by `torchrun`: when a rank dies it ends the others too and, with `--max-restarts N`, starts all anew.

The new processes have the same command line. The run directory says which launch began it, so that they go on in it as
`--resume` would instead of beginning another. A scheduler that queues a job again under the same id does the same.

Rejected: the environment's restart counter alone. Every machine counts its own failures, so the first rank's may say
that nothing happened.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from engine.files import write_text_atomic
from engine.training.parallel import Ranks
from search.config.options import parse
from search.config.schema import SearchConfig
from search.rundir import RunDir


def continued(config: SearchConfig, argv: list[str], ranks: Ranks) -> tuple[SearchConfig, Path | None]:
    """The unfinished run this launch began, as configuration and run directory, or `config` and None; on all ranks."""
    found = ranks.agree(lambda: _find(Path(config.runs), argv))
    if found is None:
        return config, None
    with tempfile.TemporaryDirectory(prefix="ffnas-config-") as folder:
        path = Path(folder) / "config.yaml"  # other machines may not see the run directory
        path.write_text(found["config"], encoding="utf-8")
        saved, _ = parse(["--config", str(path)])
    return replace(saved, ledger=config.ledger), Path(found["path"])


def sign(rundir: RunDir, argv: list[str]) -> None:
    """Notes in the run directory which launch began it; nothing where `torchrun` did not start this process."""
    signature = _signature(argv)
    if signature is not None:
        write_text_atomic(rundir.launch, signature)


def _find(runs: Path, argv: list[str]) -> dict[str, str] | None:
    signature = _signature(argv)
    anonymous = os.environ.get("TORCHELASTIC_RUN_ID") == "none"
    if signature is None or (anonymous and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"):
        return None
    for path in sorted(runs.glob("*"), reverse=True):
        run = RunDir(path)
        begun = run.launch.is_file() and run.config.is_file() and not run.report.exists()
        if begun and run.launch.read_text() == signature:
            return {"path": str(path), "config": run.config.read_text(encoding="utf-8")}
    return None


def _signature(argv: list[str]) -> str | None:
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if launch is None else hashlib.sha256(json.dumps([launch, argv]).encode()).hexdigest()
