"""Workers on one ledger: who may evaluate what, who is refused, and what becomes of those that die.

The rules are tested on SQLite, within one process; whole searches by several processes on a real PostgreSQL server.
"""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import board_worker
import postgres_server
import pytest

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from search.ledger import url as ledger_url
from search.ledger.ledger import Ledger
from search.ledger.records import Candidate, Trial
from search.ledger.shared_board import LedgerBoard

REPO = Path(__file__).resolve().parents[2]
A = Architecture.parse("linear1_1(gelu(linear1_1(x,wb1)),wb2)")
B = Architecture.parse("linear2_1(gelu(linear2_1(x,wb1)),wb2)")
FACTS = {"stage1.trials": 8, "weights.supernet": "00"}


def candidate(number, architecture=A, key=None):
    return Candidate(number, architecture, key or f"k{number}", 5)


def trial(number, score=0.5, **changes):
    return Trial("stage1", number, A, f"k{number}", score, 5, 1.0, **changes)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/shared.db"


@pytest.fixture
def two(url) -> Iterator[tuple[LedgerBoard, LedgerBoard]]:
    """Two workers, each dead for the other after two seconds without a sign of life."""
    with contextlib.ExitStack() as stack:
        ledgers = [stack.enter_context(Ledger(url, run="r", heartbeat=1, grace=2)) for _ in range(2)]
        first, second = [stack.enter_context(LedgerBoard(ledger, "stage1", FACTS)) for ledger in ledgers]
        yield first, second


def states(board: LedgerBoard) -> list[str]:
    return [t.state.name for t in board._study.get_trials()]


def test_every_candidate_is_one_workers(two):
    first, second = two
    for board in two:
        assert board.settle([candidate(n) for n in range(4)]) == [A] * 4
    assert states(first) == ["WAITING"] * 4
    assert first.claim([0, 1, 2, 3], 2, whole=False) == [0, 1]
    assert second.claim([0, 1, 2, 3], 4, whole=False) == [2, 3]
    assert first.claim([0, 1, 2, 3], 4, whole=False) == []
    first.finish(trial(0, attrs={"rungs": {"3": 0.25}}))
    second.finish(trial(2, None, state="failed", reason="out of memory"))
    second.finish(trial(3, 0.25, state="pruned", reason="behind"))
    assert (
        dict(first.finished())
        == dict(second.finished())
        == {
            0: trial(0, attrs={"rungs": {"3": 0.25}}),
            2: trial(2, None, state="failed", reason="out of memory"),
            3: trial(3, 0.25, state="pruned", reason="behind"),
        }
    )
    assert first.ledger.trials("stage1") == [first.finished()[n] for n in (0, 2, 3)]


def test_a_whole_group_is_taken_or_none_of_it(two):
    first, second = two
    for board in two:
        board.settle([candidate(n) for n in range(3)])
    assert first.claim([1], 1, whole=False) == [1]
    assert second.claim([0, 1, 2], 3, whole=True) == []
    assert first.claim([0, 2], 2, whole=True) == [0, 2], "the second one kept what it could not use"


def test_the_first_proposal_counts(two):
    first, second = two
    assert first.settle([candidate(0)]) == [A]
    assert second.settle([candidate(0, B, "other")]) == [A]
    assert second.claim([0], 1, whole=False) == [0]
    second.finish(trial(0))
    assert first.finished() == {0: trial(0)}


def test_proposals_of_the_same_moment_become_one(two, monkeypatch):
    first, second = two
    second.settle([candidate(0)])
    entries, answers = first._entries, [{}]  # as if the first one had read the ledger before the second one wrote
    monkeypatch.setattr(first, "_entries", lambda: answers.pop() if answers else entries())
    first.settle([candidate(0)])
    assert states(first) == ["WAITING", "FAIL"], "the second entry is taken back"
    assert first.claim([0], 1, whole=False) == [0]
    assert second.claim([0], 1, whole=False) == []


def test_what_a_dead_worker_had_taken_is_offered_again(two):
    first, second = two
    for board in two:
        board.settle([candidate(0), candidate(1)])
    assert first.claim([0], 1, whole=False) == [0]
    first._stop.set()  # no signs of life from now on
    assert second.claim([0, 1], 1, whole=False) == [1]
    deadline = time.monotonic() + 30
    while not (again := second.claim([0], 1, whole=False)):
        assert time.monotonic() < deadline
        second.wait()
    assert again == [0]
    first.finish(trial(0, 0.125))  # it was only asleep: too late
    assert 0 not in second.finished()
    second.finish(trial(0))
    assert first.finished() == {0: trial(0)}


def test_an_entry_abandoned_while_another_is_offered_is_offered_too(two, monkeypatch):
    first, second = two
    for board in two:
        board.settle([candidate(0), candidate(1)])
    assert first.claim([0, 1], 2, whole=False) == [0, 1]
    first._release([1])
    offer = second._offer

    def and_meanwhile(candidates):
        if 0 in first._mine:
            first._release([0])
        return offer(candidates)

    monkeypatch.setattr(second, "_offer", and_meanwhile)
    assert second.claim([0, 1], 2, whole=False) == [0, 1]


def test_tables_another_worker_is_making_are_waited_for(url, monkeypatch):
    import optuna.storages
    import sqlalchemy.exc

    real, failures = optuna.storages.RDBStorage, ["table studies already exists", "UNIQUE constraint failed: x"]

    def storage(*arguments, **options):
        if failures:
            raise sqlalchemy.exc.OperationalError("CREATE TABLE", {}, sqlite3.OperationalError(failures.pop(0)))
        return real(*arguments, **options)

    monkeypatch.setattr(optuna.storages, "RDBStorage", storage)
    with Ledger(url, run="r") as ledger:
        assert ledger.stages() == []
    assert not failures


def test_a_living_worker_keeps_what_takes_long(two):
    first, second = two
    for board in two:
        board.settle([candidate(0)])
    assert first.claim([0], 1, whole=False) == [0]
    until = time.monotonic() + 4.0  # twice the time without signs of life that is allowed
    while time.monotonic() < until:
        assert second.claim([0], 1, whole=False) == []
        second.wait()
    first.finish(trial(0))
    assert second.finished() == {0: trial(0)}


def test_a_worker_that_leaves_gives_back_at_once(url):
    with Ledger(url, run="r") as one, Ledger(url, run="r") as other, LedgerBoard(other, "stage1", FACTS) as second:
        with LedgerBoard(one, "stage1", FACTS) as first:
            first.settle([candidate(0)])
            assert first.claim([0], 1, whole=False) == [0]
        second.settle([candidate(0)])
        assert second.claim([0], 1, whole=False) == [0]


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({**FACTS, "stage1.trials": 12}, "stage1.trials 8, this worker has 12"),
        ({"weights.supernet": "00"}, "stage1.trials 8, this worker has None"),
        ({**FACTS, "weights.supernet": "01"}, "other supernet weights"),
    ],
    ids=["setting", "setting missing", "weights"],
)
def test_a_worker_that_would_train_differently_is_refused(url, facts, said):
    with Ledger(url, run="r") as ledger:
        with LedgerBoard(ledger, "stage1", FACTS):
            pass
        with pytest.raises(UserError, match=said), LedgerBoard(ledger, "stage1", facts):
            pass


def test_workers_that_began_at_the_same_moment_and_differ_are_refused_too(url):
    with Ledger(url, run="r") as ledger, LedgerBoard(ledger, "stage1", FACTS) as first:
        first.settle([candidate(0)])
        other = {**FACTS, "stage1.trials": 9}
        first._study.set_user_attr("facts", other)  # the other one wrote last
        with LedgerBoard(ledger, "stage1", other) as second, pytest.raises(UserError):
            second.settle([candidate(0)])


def test_runs_of_one_database_are_apart(url):
    with Ledger(url, run="a") as one, Ledger(url, run="b") as other:
        with LedgerBoard(one, "stage1", FACTS) as board:
            board.settle([candidate(0)])
            board.claim([0], 1, whole=False)
            board.finish(trial(0))
        assert one.stages() == ["stage1"]
        assert other.stages() == []
        assert other.trials("stage1") == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:s3cret@host:1/db", "postgresql://me@host:1/db"),
        (
            "postgresql+psycopg2://me:s3%40cret@host/db?sslmode=require",
            "postgresql+psycopg2://me@host/db?sslmode=require",
        ),
        ("me:s3cret@host/db", "...@host/db"),
        ("postgresql:///db?host=/tmp/x&password=s3cret", "postgresql:///db?host=/tmp/x"),
        ("postgresql://host/db", "postgresql://host/db"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_passwords_are_not_shown(url, shown):
    assert ledger_url.without_password(url) == shown


@pytest.mark.parametrize("url", ["study.db", "postgresql://", "://x", "/tmp/x.db", "postgresql:/me:s3cret@host/db"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(UserError, match="is not a database URL") as caught:
        ledger_url.check(url)
    assert "s3cret" not in str(caught.value)


def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"driver is not installed .*: pip install 'ffnas\[postgres\]'") as caught:
        Ledger("postgresql://me:s3cret@127.0.0.1:1/db", run="r")
    assert "s3cret" not in str(caught.value)


# Several processes, a real server.


@pytest.fixture(scope="module")
def server() -> Iterator[postgres_server.Server]:
    with postgres_server.running() as server:
        yield server


def start(folder: Path, url: str, **environment: str) -> subprocess.Popen:
    line = [sys.executable, board_worker.__file__, "ledger", str(folder), url]
    values = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(line, env=values, cwd=REPO, stderr=subprocess.PIPE, text=True)


def expected(tmp_path: Path, kind: str) -> list:
    with Ledger(tmp_path / "alone.db") as ledger:
        return board_worker.outcome(board_worker.search(ledger, None, board_worker.Evaluate(None, kind)).trials)


def search_with_deaths(tmp_path: Path, url: str, kind: str) -> None:
    """Three workers, of which one dies in its fifth candidate, and one more that joins when it has."""
    dying = start(tmp_path, url, KIND=kind, DIE_AFTER="4")
    workers = [start(tmp_path, url, KIND=kind, PAUSE="0.2") for _ in range(2)]
    assert dying.wait(timeout=120) == -signal.SIGKILL
    workers.append(start(tmp_path, url, KIND=kind))
    for worker in workers:
        errors = worker.communicate(timeout=200)[1]
        assert worker.returncode == 0, errors
    alone = expected(tmp_path, kind)
    with Ledger(url, run="test") as ledger:
        assert board_worker.outcome(ledger.trials("stage1")) == alone
    for worker in workers:
        found = json.loads((tmp_path / f"{worker.pid}.json").read_text())
        assert found == json.loads(json.dumps(alone))
    lines = (tmp_path / "evaluations").read_text().splitlines()
    finished = [line.split(" ", 1)[1] for line in lines]
    lost = sum(line.startswith(f"{dying.pid} ") for line in lines)
    assert 0 <= len(finished) - len(set(finished)) <= lost, "only what the dead one had in hand is evaluated again"


@pytest.mark.slow
def test_workers_come_and_go_on_sqlite(tmp_path):
    search_with_deaths(tmp_path, f"sqlite:///{tmp_path}/shared.db", "plain")


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "halving"])
def test_workers_come_and_go_on_postgresql(tmp_path, server, kind):
    search_with_deaths(tmp_path, server.create(f"search-{kind}"), kind)


def test_a_server_that_restarts_is_waited_for(tmp_path, server):
    url = server.create("restart")
    with Ledger(url, run="r") as ledger, LedgerBoard(ledger, "stage1", FACTS) as board:
        board.settle([candidate(0)])
        assert board.claim([0], 1, whole=False) == [0]
        server.stop()
        back = threading.Timer(2.0, server.start)  # while the board tries again
        back.start()
        board.finish(trial(0))
        back.join()
        assert board.finished() == {0: trial(0)}


@pytest.mark.parametrize("case", ["password", "database", "server"])
def test_an_unusable_server_is_reported_in_one_line_without_the_password(server, case):
    url = {
        "password": server.url(password="wrong-s3cret"),
        "database": server.url("nowhere"),
        "server": f"postgresql://ffnas:{postgres_server.PASSWORD}@127.0.0.1:1/x",
    }[case]
    with pytest.raises(UserError, match=r"^ledger postgresql://ffnas@127\.0\.0\.1:") as caught:
        Ledger(url, run="r")
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {"password": "authentication failed", "database": "does not exist", "server": "refused"}[case] in str(
        caught.value
    )
