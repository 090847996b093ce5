"""`ffnas join`: a search and its workers end with what one process finds; who cannot help is told why."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import (  # noqa: F401  fixtures
    REPO,
    WITHOUT_BASELINES,
    command,
    options,
    outcome,
    refused,
    run,
    undisturbed,
    workspace,
)


def start(arguments: list[str], module: str, folder: Path) -> subprocess.Popen:
    _, environment = command(folder)
    line = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_search_and_its_worker_find_what_one_process_finds(workspace: Path, undisturbed: Path):  # noqa: F811
    """The search is ended in stage 1 and resumed, while the worker stays and goes on."""
    folder = workspace / "runs" / "shared"
    ledger = f"sqlite:///{workspace}/shared.db"
    search = start([*options(workspace, "shared"), *WITHOUT_BASELINES, "--ledger", ledger], "search.run", workspace)
    while not (folder / "stage1" / "supernet.safetensors").exists():
        assert search.poll() is None, search.communicate()
        time.sleep(0.01)
    worker = start([str(folder)], "search.commands.join", workspace)
    search.terminate()
    assert search.wait(timeout=60) == 143
    result = run(workspace, "--resume", str(folder))
    assert result.returncode == 0, result.stderr
    said, errors = worker.communicate(timeout=120)
    assert worker.returncode == 0, errors
    assert "nothing left to do" in said
    assert outcome(folder) == outcome(undisturbed)
    assert not (folder / "study.db").exists()
    # whoever comes late finds everything done
    late = start([str(folder)], "search.commands.join", workspace)
    assert late.wait(timeout=120) == 0
    # another run of that name, with other settings, is refused
    other = [*options(workspace, "shared"), *WITHOUT_BASELINES, "--ledger", ledger, "--stage1.trials", "4"]
    other[other.index("--runs") + 1] = str(workspace / "elsewhere")
    result = run(workspace, *other)
    assert result.returncode == 2
    assert "stage1.trials 3, this worker has 4" in result.stderr


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("study.db", "is not a database URL"),
        ("postgresql://me:s3cret@127.0.0.1:1/db", "ledger postgresql://me@127.0.0.1:1/db"),
        ("nosuchdb://me:s3cret@host/db", "ledger nosuchdb://me@host/db"),
    ],
)
def test_an_unusable_ledger_ends_in_one_line(workspace: Path, refused, url: str, said: str):  # noqa: F811
    message = refused(*options(workspace, "bad-ledger"), "--ledger", url)
    assert said in message
    assert "s3cret" not in message
    assert not (workspace / "runs" / "bad-ledger").exists()


def test_a_shared_ledger_needs_a_name(workspace: Path, refused):  # noqa: F811
    arguments = options(workspace, "unused")
    at = arguments.index("--name")
    arguments[at : at + 2] = []
    assert "--name" in refused(*arguments, "--ledger", "sqlite:////tmp/x.db")


def test_a_search_of_its_own_cannot_be_joined(tmp_path: Path, capsys):
    from search.cli import main
    from search.config.options import parse, save_config

    assert main(["join", str(tmp_path)]) == 2
    assert "no config.yaml" in capsys.readouterr().err
    save_config(parse(["--name", "x"])[0], tmp_path / "config.yaml")
    assert main(["join", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "keeps its ledger to itself" in message
    assert main(["join"]) == 2
    assert "ffnas join --help" in capsys.readouterr().err


def test_the_password_is_not_saved(tmp_path: Path):
    from search.config.options import parse, save_config

    config, _ = parse(["--name", "x", "--ledger", "postgresql://me:s3cret@host/db"])
    assert config.ledger == "postgresql://me:s3cret@host/db"
    save_config(config, tmp_path / "config.yaml")
    assert "s3cret" not in (tmp_path / "config.yaml").read_text()
    assert parse(["--resume", str(tmp_path)])[0].ledger == "postgresql://me@host/db"
    again = parse(["--resume", str(tmp_path), "--ledger", "postgresql://me:s3cret@host/db"])[0]
    assert again.ledger == "postgresql://me:s3cret@host/db"
