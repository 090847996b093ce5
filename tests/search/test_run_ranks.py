"""`torchrun --nproc-per-node 2 -m search.run`: the same search, one voice, and an end for all ranks.

The whole run is slow (two processes import everything and share two cores); wrong input is not.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import REPO, WITHOUT_BASELINES, options, run, workspace  # noqa: F401  workspace is a fixture

ALIKE = 2e-3
"""Relative difference of logged losses: fp32 sums in another order, amplified by AdamW over a few dozen steps."""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FFNAS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line += ["-m", "search.run", *arguments]
    return subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=280)


def losses(folder: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["phase"], line["step"], line["total"]) for line in lines]


@pytest.mark.parametrize(
    ("option", "value"),
    [("--stage1.trials", "many"), pytest.param("--data.label_column", "stars", marks=pytest.mark.slow)],
    ids=["before the ranks meet", "after"],
)
def test_wrong_input_is_told_once_and_ends_every_rank_with_2(workspace: Path, option: str, value: str):  # noqa: F811
    result = torchrun(workspace, *options(workspace, "ranks-wrong"), option, value)
    assert result.returncode != 0
    told = [line for line in result.stderr.splitlines() if line.startswith("ffnas: error: ")]
    assert len(told) == 1, result.stderr
    assert value in told[0]
    assert "Traceback" not in result.stdout
    # torchrun's own report names the exit code of the ranks it saw end by themselves
    assert "exitcode  : 2" in result.stderr
    assert "exitcode  : 1 " not in result.stderr
    assert not (workspace / "runs" / "ranks-wrong").exists()


@pytest.mark.slow
def test_two_ranks_search_as_one_does(workspace: Path):  # noqa: F811
    extra = (*WITHOUT_BASELINES, "--targets.cache", "disk", "--warmup.accumulate", "2")
    result = torchrun(workspace, *options(workspace, "ranks-two"), *extra)
    assert result.returncode == 0, result.stderr
    assert run(workspace, *options(workspace, "ranks-one"), *WITHOUT_BASELINES).returncode == 0
    two, one = workspace / "runs" / "ranks-two", workspace / "runs" / "ranks-one"
    for name in ("summary.json", "report.html", "best/model/model.safetensors"):
        assert (two / name).is_file()
    assert result.stdout.count("run directory: ") == 1
    first = [entry for entry in losses(two) if entry[0] == "warm-up"]
    assert first == [
        (phase, step, pytest.approx(total, rel=ALIKE)) for phase, step, total in losses(one) if phase == "warm-up"
    ]
    assert [entry[:2] for entry in losses(two)] == [entry[:2] for entry in losses(one)]  # nothing twice
    trials = [list(csv.DictReader((folder / "stage1" / "candidates.csv").open())) for folder in (two, one)]
    assert [len(rows) for rows in trials] == [3, 3]
