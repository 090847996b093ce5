"""What of a finished run stays, that further commands have all they need, and kills while files go."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from fault_runs import options, outcome, unfinished_files
from test_inherit import small

from search.cli import main
from search.finished import summary_of

WEIGHTS = (".safetensors", ".copy", ".pt", ".previous")


def weights(run: Path) -> set[str]:
    """Files of weights in a run directory, the second copies of configuration and ledger left out."""
    files = (p.relative_to(run) for p in run.rglob("*") if p.is_file() and p.suffix in WEIGHTS)
    return {str(p) for p in files if p.name not in (".config.yaml.copy", ".study.db.copy")}


def argv(kind: str, folder: Path, name: str, *more: str) -> list[str]:
    made = small(folder, folder / "runs", name) if kind == "inherit" else options(folder, folder / "runs", name)
    if kind == "paper":
        made += ["--baselines.gelu", "true"]
    return [*made, *more]


@pytest.fixture(scope="module", params=["inherit", "paper"])
def ended(request, nursery, folder) -> dict:
    """A run that keeps models, and the same one with every file."""
    kind = request.param
    found = {"kind": kind, "argv": argv(kind, folder, kind)}
    for name, more in ((kind, ()), (f"{kind}-all", ("--files", "all"))):
        ran = nursery.run(argv(kind, folder, name, *more), folder / "cache")
        assert ran.code == 0, ran.err
        found[name.removeprefix(kind) or "-models"] = folder / "runs" / name
        found[f"out{name.removeprefix(kind)}"] = ran.out
    return found


def test_models_stay_and_what_only_resuming_needs_goes(ended):
    supernet = {"stage3/supernet.safetensors"} if ended["kind"] == "paper" else set()
    assert weights(ended["-models"]) == {"best/model/model.safetensors"} | supernet
    everything = weights(ended["-all"])
    found = "search" if ended["kind"] == "inherit" else "derive"
    assert {f"checkpoints/{found}/task.safetensors", f"checkpoints/{found}/.task.safetensors.copy"} <= everything
    assert len(everything) >= 8
    assert "removed what only resuming needs" in ended["out"]
    assert "removed what" not in ended["out-all"]
    assert outcome(ended["-models"]) == outcome(ended["-all"])
    others = [{str(p.relative_to(r)) for p in r.rglob("*") if p.is_file()} - weights(r)
              for r in (ended["-models"], ended["-all"])]  # fmt: skip
    assert others[0] == others[1]


@pytest.mark.parametrize("kept", ["-models", "-all"])
def test_resuming_a_finished_run_says_so_and_changes_nothing(ended, kept, capsys):
    run = ended[kept]
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    assert main(["search", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "has finished, nothing is left to do" in said
    assert json.loads((run / "summary.json").read_text())["evidence"]["verdict"] in said
    assert str(run / "best" / "model") in said
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_what_stays_is_enough_for_further_commands(ended, nursery, folder, tmp_path):
    """Report, predict, export and another budget from a run that kept its models alone."""
    run = tmp_path / "run"
    shutil.copytree(ended["-models"], run)
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    model, answers = run / "best" / "model", tmp_path / "answers.tsv"
    assert main(["predict", str(model), "--data", str(folder / "dev.csv"), "--out", str(answers)]) == 0
    assert len(answers.read_text().splitlines()) == 41
    assert main(["export", str(run), "--program"]) == 0
    budget = ["--budget.encoder", "0.7"] if ended["kind"] == "inherit" else ["--budget.params", "0", "1e9"]
    resolved = nursery.run(["--resolve", str(run), *budget], folder / "cache")
    assert resolved.code == 0, resolved.err
    assert list((run / "resolved").glob("*/model/model.safetensors"))


@pytest.mark.parametrize("removed", [1, 3])
def test_a_kill_while_files_go_leaves_a_finished_run(ended, nursery, folder, removed):
    name = f"{ended['kind']}-killed-{removed}"
    run = folder / "runs" / name
    killed = nursery.run(argv(ended["kind"], folder, name), folder / "cache", inject=f"killed_after_removing:{removed}")
    assert killed.code == -signal.SIGKILL
    assert len(weights(run)) > len(weights(ended["-models"]))
    assert summary_of(run) is not None
    assert unfinished_files(run) == []
    again = nursery.run(["--resume", str(run)], folder / "cache")
    assert again.code == 0, again.err
    assert "has finished" in again.out
    assert weights(run) == weights(ended["-models"])
    assert outcome(run) == outcome(ended["-models"])


def test_a_damaged_model_of_a_finished_run_is_made_again(ended, nursery, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ended["-models"], run)
    path = run / "best" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    assert summary_of(run) is None
    again = nursery.run(["--resume", str(run)], folder / "cache")
    assert again.code == 0, again.err
    assert outcome(run) == outcome(ended["-models"])


def test_lost_weights_of_the_round_are_made_again(nursery, folder):
    """Killed as soon as the first student is finished, and robbed of what the others start from."""
    calm = nursery.run(argv("inherit", folder, "round-calm"), folder / "cache")
    assert calm.code == 0, calm.err
    run = folder / "runs" / "round-lost"
    killed = nursery.run(
        argv("inherit", folder, "round-lost"),
        folder / "cache",
        when=run / "checkpoints" / "search" / "task.safetensors",
    )
    assert killed.code == -signal.SIGKILL
    lost = list((run / "checkpoints").glob("*round *"))
    for path in lost:
        path.unlink()
    for path in (run / "checkpoints").glob("*/*task.safetensors*"):
        path.write_bytes(b"damaged")
    again = nursery.run(["--resume", str(run)], folder / "cache")
    assert again.code == 0, again.err
    assert "weights of the last round are lost or damaged" in again.out
    assert outcome(run) == outcome(folder / "runs" / "round-calm")


def test_another_word_for_files_is_refused(capsys):
    assert main(["search", "--files", "some"]) == 2
    assert "files: 'some' is not known" in capsys.readouterr().err
