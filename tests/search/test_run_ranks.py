"""`torchrun --nproc-per-node 2 -m search.run`: the same search, one voice, and an end for all ranks.

The whole run is slow (two processes import everything and share two cores); wrong input is not.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import REPO, WITHOUT_BASELINES, options, run, workspace  # noqa: F401  workspace is a fixture

ALIKE = 2e-3
"""Relative difference of logged losses: fp32 sums in another order, amplified by AdamW over a few dozen steps."""


def torchrun_line(*launcher: str, search: tuple[str, ...]) -> list[str]:
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launcher]
    return [*line, "-m", "search.run", *search]


def torchrun_environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "FFNAS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = torchrun_line(search=arguments), torchrun_environment(folder)
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


SAME_WEIGHTS = (
    *("--warmup.steps", "0", "--stage3.text.steps", "0", "--stage3.task.steps", "0"),
    *("--stage1.trials", "6", "--stage2.trials", "5", "--stage3.together", "2", "--sampler.concurrent", "2"),
)
"""Ranks train nothing together before the stages, so candidates start from the same bits for any number of them."""


def trials(folder: Path) -> list[list[dict[str, str]]]:
    """Rows of all stages, without times."""
    tables = [list(csv.DictReader((folder / f"stage{n}" / "candidates.csv").open())) for n in (1, 2, 3)]
    return [[{k: v for k, v in row.items() if k != "seconds"} for row in table] for table in tables]


@pytest.fixture(scope="module")
def by_one(workspace: Path) -> list[list[dict[str, str]]]:  # noqa: F811
    """The trials of one process."""
    result = run(workspace, *options(workspace, "trials-one"), *WITHOUT_BASELINES, *SAME_WEIGHTS)
    assert result.returncode == 0, result.stderr
    found = trials(workspace / "runs" / "trials-one")
    assert [len(table) for table in found] == [6, 5, 4]
    return found


@pytest.mark.slow
def test_two_ranks_evaluate_the_candidates_of_one_with_the_same_scores(workspace: Path, by_one):  # noqa: F811
    result = torchrun(workspace, *options(workspace, "trials-two"), *WITHOUT_BASELINES, *SAME_WEIGHTS)
    assert result.returncode == 0, result.stderr
    assert trials(workspace / "runs" / "trials-two") == by_one


def rank_process(launcher: int, rank: int) -> int | None:
    """Process id of a rank `torchrun` started."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_started_again_and_the_run_goes_on(workspace: Path, by_one, rank: int):  # noqa: F811
    """No name is given, so that the restarted ranks must find the run directory by themselves."""
    runs = workspace / f"runs-restart-{rank}"
    arguments = options(workspace, "unnamed")
    at = arguments.index("--name")
    arguments[at : at + 2] = []
    arguments[arguments.index("--runs") + 1] = str(runs)
    process = subprocess.Popen(
        torchrun_line("--max-restarts", "1", search=(*arguments, *WITHOUT_BASELINES, *SAME_WEIGHTS)),
        cwd=REPO,
        env=torchrun_environment(workspace),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        while not list(runs.glob("*/stage1/best.json")):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        victim = rank_process(process.pid, rank)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        output, _ = process.communicate(timeout=280)
    finally:
        process.kill()
    assert process.returncode == 0, output
    folders = list(runs.iterdir())
    assert len(folders) == 1, "a second run was begun"
    assert trials(folders[0]) == by_one
    assert (folders[0] / "report.html").is_file()
