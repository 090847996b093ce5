"""Ranks that divide the candidates of a stage: the trials of one process, whoever evaluates them and whoever dies.

Real processes connected by gloo, with an evaluation that only sleeps (`board_worker.py`).
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import board_worker
import pytest

from search.ledger.ledger import Ledger

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(board_worker.__file__)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(folder: Path, size: int, **environment: dict[int, str] | str) -> list[int]:
    """Exit codes of `size` ranks; a dictionary gives a variable to some of them only."""
    port = str(free_port())
    processes = []
    for rank in range(size):
        values = {
            name: value if isinstance(value, str) else value[rank]
            for name, value in environment.items()
            if isinstance(value, str) or rank in value
        }
        values |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        line = [sys.executable, str(WORKER), "rank", str(folder)]
        processes.append(subprocess.Popen(line, env={**os.environ, **values}, cwd=REPO))
    try:
        return [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module", params=[pytest.param("plain", marks=pytest.mark.slow), "halving"])
def alone(request, tmp_path_factory):
    """(kind, outcome) of one process."""
    with Ledger(tmp_path_factory.mktemp("alone") / "study.db") as ledger:
        log = board_worker.search(ledger, None, board_worker.Evaluate(None, request.param))
    assert len(log.trials) == board_worker.TOTAL
    return request.param, board_worker.outcome(log.trials)


def as_json(value):
    return json.loads(json.dumps(value))


def recorded(folder: Path) -> list:
    with Ledger(folder / "study.db") as ledger:
        return board_worker.outcome(ledger.trials("stage1"))


def evaluators(folder: Path) -> list[tuple[str, str]]:
    """(process, architecture) of every evaluation."""
    return [tuple(line.split(" ", 1)) for line in (folder / "evaluations").read_text().splitlines()]


def test_ranks_find_what_one_process_finds_each_candidate_once(alone, tmp_path):
    kind, expected = alone
    assert run_ranks(tmp_path, 2, KIND=kind) == [0, 0]
    assert recorded(tmp_path) == expected
    for rank in range(2):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == as_json(expected)
    evaluated = evaluators(tmp_path)
    assert len(evaluated) == len({a for _, a in evaluated}) == board_worker.TOTAL
    shares = [sum(who == worker for who, _ in evaluated) for worker in {who for who, _ in evaluated}]
    assert len(shares) == 2
    assert min(shares) >= board_worker.TOTAL // 5, "the other one did nearly everything"
    assert not list(tmp_path.glob("unused-*.db")) or all(
        Ledger(path).trials("stage1") == [] for path in tmp_path.glob("unused-*.db")
    )


def test_a_dead_ranks_candidates_go_to_the_others(alone, tmp_path):
    kind, expected = alone
    codes = run_ranks(tmp_path, 3, KIND=kind, DIE_AFTER={1: "5"}, DEATHS="1")
    assert codes[1] == -9
    assert codes[0] == codes[2] == 3  # the next collective cannot take place
    assert recorded(tmp_path) == expected
    assert not (tmp_path / "rank1.json").exists()


@pytest.mark.slow
def test_what_all_ranks_recorded_before_a_kill_is_not_evaluated_again(alone, tmp_path):
    kind, expected = alone
    codes = run_ranks(tmp_path, 2, KIND=kind, DIE_AFTER={0: "7"}, DEATHS="1")
    assert codes[0] == -9
    assert codes[1] != 0  # the first rank has the ledger: without it there is nothing to go on with
    before = recorded(tmp_path)
    assert 4 <= len(before) < board_worker.TOTAL
    assert set(map(str, before)) <= set(map(str, expected))
    (tmp_path / "evaluations").unlink()
    assert run_ranks(tmp_path, 2, KIND=kind) == [0, 0]
    assert recorded(tmp_path) == expected
    again = {a for _, a in evaluators(tmp_path)}
    assert again.isdisjoint(text for _, text, *_ in before)


@pytest.mark.slow
def test_who_is_free_takes_the_next_one(tmp_path):
    """The first rank needs fifty times as long for a candidate."""
    assert run_ranks(tmp_path, 3, PAUSE={0: "0.5", 1: "0.01", 2: "0.01"}) == [0, 0, 0]
    evaluated = evaluators(tmp_path)
    slow = min(sum(who == worker for who, _ in evaluated) for worker in {who for who, _ in evaluated})
    assert slow <= board_worker.TOTAL // 4, "work was divided in equal shares"
