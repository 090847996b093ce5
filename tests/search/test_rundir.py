"""The run directory: created once, locked, and a log of whole lines."""

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from engine.errors import UserError
from search.rundir import RunDir, default_name, drop_torn_line

HOLDER = """
import sys, time
from search.rundir import RunDir
rundir = RunDir(sys.argv[1]).open(resume=True)
print("open", flush=True)
number = 0
while True:
    rundir.log({"phase": "p" * 2000, "step": number})
    print(number, flush=True)
    number += 1
"""


def test_paths_are_those_of_the_contract(tmp_path):
    rundir = RunDir(tmp_path / "a")
    names = [
        *(rundir.config, rundir.ledger, rundir.log_file, rundir.summary, rundir.report, rundir.checkpoints),
        *(rundir.plots, rundir.stage(1), rundir.candidates(3), rundir.architecture, rundir.model),
    ]
    assert [str(p.relative_to(tmp_path / "a")) for p in names] == [
        *("config.yaml", "study.db", "log.jsonl", "summary.json", "report.html", "checkpoints"),
        *("plots", "stage1", "stage3/candidates.csv", "best/architecture.json", "best/model"),
    ]
    assert not rundir.path.exists()
    with pytest.raises(ValueError, match="stage 4"):
        rundir.stage(4)


def test_a_used_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: continue it with --resume"):
        RunDir(tmp_path / "run").open()
    assert os.listdir(tmp_path / "run") == ["notes.txt"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="a file of that name"):
        RunDir(tmp_path / "run").open()


def test_a_run_killed_before_its_first_file_can_be_started_again(tmp_path):
    RunDir(tmp_path / "run").open().close()
    RunDir(tmp_path / "run").open().close()


def test_only_a_run_can_be_resumed(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"no config\.yaml there"):
            RunDir(path).open(resume=True)
    assert os.listdir(tmp_path) == []


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDir(tmp_path / "file" / "run").open()


def test_second_holder_is_refused_until_the_first_closes(tmp_path):
    first = RunDir(tmp_path / "run").open()
    first.config.write_text("{}")
    with pytest.raises(UserError, match=rf"in use by another process \(pid {os.getpid()} on "):
        RunDir(tmp_path / "run").open(resume=True)
    first.close()
    with RunDir(tmp_path / "run").open(resume=True):
        pass


def test_lock_and_log_survive_a_killed_process(tmp_path):
    with RunDir(tmp_path / "run").open() as rundir:
        rundir.config.write_text("{}")
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "open\n"
        with pytest.raises(UserError, match=f"pid {child.pid}"):
            RunDir(tmp_path / "run").open(resume=True)
        for _ in range(50):
            last = child.stdout.readline()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunDir(tmp_path / "run").open(resume=True) as rundir:
        rundir.log({"phase": "after", "step": -1})
        steps = [json.loads(line)["step"] for line in rundir.log_file.read_text().splitlines()]
    assert steps == [*range(len(steps) - 1), -1]
    assert len(steps) - 1 > int(last)


@pytest.mark.parametrize("tail", ['{"step": 2', '{"step": 2}', "\0\0\0\n", "{\n\n", ""], ids=repr)
def test_torn_last_line_is_dropped(tmp_path, tail):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n' + tail)
    drop_torn_line(path)
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_log_of_one_torn_line_becomes_empty(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step')
    drop_torn_line(path)
    assert path.read_text() == ""


def test_numbers_json_has_no_word_for_become_null(tmp_path):
    with RunDir(tmp_path / "run").open() as rundir:
        rundir.log({"phase": "größer", "loss": math.nan, "hidden": math.inf, "step": 3})
        assert json.loads(rundir.log_file.read_text()) == {"phase": "größer", "loss": None, "hidden": None, "step": 3}


def test_default_names_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda _: "20260101-120000")
    names = []
    for _ in range(3):
        names.append(default_name("demo", tmp_path))
        (tmp_path / names[-1]).mkdir()
    assert names == [f"20260101-120000-demo{tail}" for tail in ("", "-2", "-3")]
