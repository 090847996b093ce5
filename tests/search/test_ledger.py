"""The ledger: what goes in comes out, once, after any kill, and a bad file ends in one clear line."""

import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from engine.architecture.architecture import LayerSpec, uniform
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression
from search.ledger.ledger import Ledger, Trial

SPEC = LayerSpec(parse_expression("tanh(linear(gelu(linear(max(x,tanh(x)),wb1)),wb2))"), 4, Fraction(1, 3))


def make(number, score=0.5, stage="stage1", layers=6, stack=2, **changes):
    architecture = uniform(GELU_FFN, stack, Fraction(1, 2), layers)
    values = {"key": f"k{number}", "params": 15_737_724, "seconds": 1.5, "state": "complete", **changes}
    return Trial(stage, number, architecture, score=score, **values)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study.db"


def test_what_is_recorded_is_read_back_after_reopening(path):
    trials = [
        make(0, 0.1234567890123456789, attrs={"metrics": {"f1": 0.5}, "note": "größer"}),
        make(1, None, state="failed", reason="out of memory"),
        make(2, 0.3, state="pruned", reason="behind"),
        make(3, None, state="pruned"),
        make(4, -1e300, seconds=0.0),
        Trial("stage1", 5, uniform(SPEC.expression, 4, SPEC.ratio, 12), "k5", 0.0, 1, 0.25),
        make(6, -0.0),
    ]
    other = make(0, 0.9, stage="stage3")
    with Ledger(path) as ledger:
        for trial in (*reversed(trials), other):
            ledger.record(trial)
        assert ledger.trials("stage1") == trials
    with Ledger(path) as ledger:
        assert ledger.stages() == ["stage1", "stage3"]
        assert ledger.trials("stage1") == trials
        assert ledger.trials("stage3") == [other]
        assert ledger.trials("stage2") == []


def test_recording_again_does_nothing_and_another_candidate_is_refused(path):
    for _ in range(2):
        with Ledger(path) as ledger:
            ledger.record(make(7))
            ledger.record(make(7))
    with Ledger(path) as ledger:
        with pytest.raises(UserError, match="trial 7 of stage1 is there with another candidate"):
            ledger.record(make(7, key="another"))
        assert len(ledger.trials("stage1")) == 1


def test_the_study_is_one_optuna_and_its_dashboard_understand(path):
    import optuna

    with Ledger(path) as ledger:
        for number in range(8):
            ledger.record(make(number, score=0.1 * number, stack=1 + number % 4, layers=2, seconds=3.0))
        ledger.record(make(8, None, state="failed", reason="NaN", layers=2))
    study = optuna.load_study(study_name="stage1", storage=f"sqlite:///{path}")
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.best_value == pytest.approx(0.7)
    assert [t.state.name for t in study.trials] == ["COMPLETE"] * 8 + ["FAIL"]
    best = study.best_trial
    assert best.params == {"layer0.stack": 4, "layer0.ratio": "1/2", "layer1.stack": 4, "layer1.ratio": "1/2"}
    assert best.duration.total_seconds() == pytest.approx(3.0)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    importance = optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert set(importance) == set(best.params)
    study._storage.remove_session()


def test_a_space_widened_later_keeps_the_studys_categories(path):
    with Ledger(path) as ledger:
        ledger.record(make(0))
    with Ledger(path, stacks=(1, 2, 3, 4, 5), ratios=(Fraction(1), Fraction(1, 8))) as ledger:
        ledger.record(make(1, stack=5))
        ledger.record(make(2, stack=1))
        assert [t.architecture.layers[0].stack for t in ledger.trials("stage1")] == [2, 5, 1]


def test_a_score_that_is_no_number_is_a_failure():
    trial = make(0, float("nan"))
    assert (trial.state, trial.score, trial.reason) == ("failed", None, "the score is nan")
    assert make(0, float("inf"), reason="r").reason == "r"


@pytest.mark.parametrize(
    "values",
    [{"score": None}, {"state": "failed"}, {"state": "running"}, {"number": -1}],
    ids=["complete without score", "failed with score", "unknown state", "negative number"],
)
def test_a_contradictory_trial_cannot_be_made(values):
    with pytest.raises(ValueError):
        make(**{"number": 0, **values})


def test_recording_is_fast(path):
    # 13 to 25 ms on one free core with 6 layers; four times that is a change of design, not a loaded machine
    with Ledger(path) as ledger:
        seconds = []
        for number in range(40):
            began = time.process_time()
            ledger.record(make(number))
            seconds.append(time.process_time() - began)
    assert statistics.median(seconds[5:]) < 0.1


def write_until_killed(path, pipe):
    with Ledger(path) as ledger:
        number = len(ledger.trials("stage1"))
        os.write(pipe, b"open\n")
        while True:
            ledger.record(make(number, score=float(number), layers=3))
            os.write(pipe, b"%d\n" % number)
            number += 1


def kill_writers(path, delays):
    """Forks a writer per delay and kills it that many seconds after it started (None: while it makes the tables)."""
    import optuna  # noqa: F401  before the forks, so that a writer starts at once

    for delay in delays:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            write_until_killed(path, writer)
        os.close(writer)
        if delay is None:
            while not path.exists() or path.stat().st_size == 0:
                time.sleep(0.0005)
        else:
            assert os.read(reader, 5) == b"open\n"
            time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader) as lines:
            said = [int(line) for line in lines if line.strip().isdecimal()]
        with Ledger(path) as ledger:
            trials = ledger.trials("stage1")
        assert [t.number for t in trials] == list(range(len(trials)))
        assert [t.score for t in trials] == [float(t.number) for t in trials]
        if said:  # the trial in flight may have been written just before its number was said
            assert len(trials) - 2 <= said[-1] < len(trials)
    return len(trials)


def test_kill_at_any_instant_loses_nothing_that_was_recorded(path):
    """Twelve kills: the first while the tables are made, the others at instants spread over opening and recording."""
    code = (
        "import sys, pathlib, test_ledger as t\n"
        "print(t.kill_writers(pathlib.Path(sys.argv[1]), [None, *(0.037 * i for i in range(11))]))"
    )
    folders = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": folders}
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10


def one_line(action, match):
    with pytest.raises(UserError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_locked_ledger_is_reported(path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)  # Optuna waits between its retries
    with Ledger(path, timeout=0.05) as ledger:
        ledger.record(make(0))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        one_line(lambda: ledger.record(make(1)), "is locked by another process")
        one_line(lambda: Ledger(path, timeout=0.05), "is locked by another process")
        other.execute("ROLLBACK")
        other.close()
        ledger.record(make(1))
        assert len(ledger.trials("stage1")) == 2


@pytest.mark.parametrize("damage", ["garbage", "truncated", "overwritten"])
def test_a_damaged_ledger_is_reported(path, damage):
    with Ledger(path) as ledger:
        for number in range(5):
            ledger.record(make(number))
    content = path.read_bytes()
    if damage == "garbage":
        path.write_bytes(b"not a database at all" * 100)
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    one_line(lambda: Ledger(path).trials("stage1"), "damaged")


def test_an_entry_ffnas_did_not_write_is_reported(path):
    import optuna

    with Ledger(path) as ledger:
        ledger.record(make(0))
    study = optuna.load_study(study_name="stage1", storage=f"sqlite:///{path}")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    study._storage.remove_session()
    with Ledger(path) as ledger:
        one_line(lambda: ledger.trials("stage1"), "entry 1 of stage1 was not written by ffnas")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_unwritable_ledger_is_reported(path):
    with Ledger(path) as ledger:
        ledger.record(make(0))
    path.chmod(0o444)
    one_line(lambda: Ledger(path), "is not writable")


def test_a_ledger_opened_read_only_is_reported(path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    with Ledger(path) as ledger:
        ledger.record(make(0))
    with Ledger(f"sqlite:///file:{path}?mode=ro&uri=true") as ledger:
        assert len(ledger.trials("stage1")) == 1
        one_line(lambda: ledger.record(make(1)), "is not writable")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing/folder/study.db", "does not exist"),
        (".", "is a folder"),
        ("nosuchdb://host/name", "ledger nosuchdb://host/name"),
        ("postgresql://me:secret@127.0.0.1:1/name", "ledger postgresql://me@127.0.0.1:1/name"),
    ],
)
def test_a_wrong_place_is_reported_without_passwords(tmp_path, monkeypatch, target, message):
    monkeypatch.chdir(tmp_path)
    assert "secret" not in one_line(lambda: Ledger(target), message)


def test_any_character_may_be_in_the_path(tmp_path):
    folder = tmp_path / "50% {done}? #1 ä"
    folder.mkdir()
    with Ledger(folder / "study.db") as ledger:
        ledger.record(make(0))
    assert os.listdir(folder) == ["study.db"]


def test_a_url_is_accepted(path):
    with Ledger(f"sqlite:///{path}") as ledger:
        ledger.record(make(0))
    with Ledger(path) as ledger:
        assert ledger.trials("stage1") == [make(0)]


def test_importing_the_search_loads_no_optuna():
    code = "import sys, search, search.ledger.ledger; print('optuna' in sys.modules, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "False False\n"
