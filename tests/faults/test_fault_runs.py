"""Tiny searches under faults: what is resumed ends as the undisturbed run did, and every end is one clear line."""

import fcntl
import json
import os
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest
from fault_runs import Nursery, make_inputs, options, outcome, unfinished_files
from kill_runs import kill_and_resume, kills

from engine.errors import UserError
from engine.teacher import Teacher


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def calm(nursery, folder) -> dict:
    """The undisturbed run: its outcome, its directory with every file there is, and the seconds it took."""
    ended = nursery.run([*options(folder, folder / "runs", "calm"), "--files", "all"], folder / "cache")
    assert ended.code == 0, ended.err
    return {"outcome": outcome(folder / "runs" / "calm"), "path": folder / "runs" / "calm", "seconds": ended.seconds}


@pytest.fixture
def search(nursery, folder, request, tmp_path):
    """Starts a search, or resumes it: `search(**faults)`, `search.resume(**faults)`."""

    class Search:
        path = tmp_path / "run"

        def __call__(self, *more: str, **faults):
            return nursery.run([*options(folder, tmp_path, "run"), *more], tmp_path / "cache", **faults)

        def resume(self, **faults):
            return nursery.run(["--resume", str(self.path)], tmp_path / "cache", **faults)

    return Search()


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("share", [0.5])
def test_a_killed_run_resumes_to_the_same_end(nursery, folder, calm, share):
    assert kill_and_resume(nursery, folder, f"kill{share}", share * calm["seconds"], calm["outcome"]) is None


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_hundred_kills(nursery, folder):
    assert kills(nursery, folder, 100, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_the_run_in_one_line_and_it_resumes(search, calm, signum, code):
    ended = search(when=search.path / "stage1" / "supernet.safetensors", signum=signum)
    assert ended.code == code
    assert len(lines(ended.err)) == 1
    assert "finished work is kept (--resume goes on)" in ended.err
    assert unfinished_files(search.path) == []
    if signum == signal.SIGTERM:
        assert search.resume().code == 0
        assert outcome(search.path) == calm["outcome"]


KINDS = [
    *("config.yaml", "study.db", "phases.json", "log.jsonl", "summary.json", "report.html"),
    *("stage1/supernet.safetensors", "stage3/warmup.safetensors", "stage3/supernet.safetensors"),
    *("checkpoints/derive/text.safetensors", "checkpoints/derive/task.safetensors"),
    *("stage1/candidates.csv", "stage2/best.json", "best/architecture.json", "best/model/model.safetensors"),
    "best/model/config.json",
]


@pytest.mark.parametrize("harm", [pytest.param("cut", marks=pytest.mark.slow), "overwritten"])
def test_all_kinds_of_files_damaged_at_once_are_made_again(nursery, folder, calm, tmp_path, harm):
    run = tmp_path / "run"
    shutil.copytree(calm["path"], run)
    for name in KINDS:
        content = (run / name).read_bytes()
        middle = len(content) // 2
        hurt = content[:middle] if harm == "cut" else content[:middle] + b"\xff\x00" * 20 + content[middle + 40 :]
        (run / name).write_bytes(hurt)
    for entry in (folder / "cache" / "teachers").glob("*/model.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-5])
    ended = nursery.run(["--resume", str(run)], folder / "cache")
    assert ended.code == 0, ended.err
    assert outcome(run) == calm["outcome"]
    assert unfinished_files(run) == []
    said = ended.out + ended.err
    for name in ("config.yaml", "study.db", "stage3/supernet.safetensors", "cached teacher"):
        assert len([line for line in lines(said) if name in line and "damaged" in line]) == 1, (name, said)
    assert "Traceback" not in said


@pytest.mark.slow
def test_lost_weights_are_trained_again_to_the_same_bytes(nursery, folder, calm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(calm["path"], run)
    (run / "summary.json").unlink()  # as if it had not finished
    for name in ("stage1/supernet.safetensors", "checkpoints/derive/text.safetensors"):
        for path in (run / name, (run / name).with_name(f".{Path(name).name}.copy")):
            path.write_bytes(path.read_bytes()[:100])
    ended = nursery.run(["--resume", str(run)], folder / "cache")
    assert ended.code == 0, ended.err
    assert "is trained again" in ended.out
    assert outcome(run) == calm["outcome"]


@pytest.mark.slow
@pytest.mark.parametrize("write", [3, 8, 12, 20, 28])
def test_a_full_disk_ends_in_one_line_and_nothing_is_lost(search, calm, write):
    ended = search(inject=f"full_disk_at:{write}")
    assert ended.code == 4
    assert len(lines(ended.err)) == 1
    assert "No space left on device: free disk space; finished work is kept" in ended.err
    assert unfinished_files(search.path) == []
    assert search.resume().code == 0
    assert outcome(search.path) == calm["outcome"]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1_000, 20_000, 90_000, 200_000, "largest"])
def test_files_that_cannot_grow_end_in_one_line(search, calm, limit):
    """A real refusal by the kernel, of every library's writes, SQLite's included; at last of the largest file alone."""
    if limit == "largest":
        limit = max(p.stat().st_size for p in calm["path"].rglob("*") if p.is_file()) - 1
    ended = search(file_limit=limit)
    assert ended.code in (2, 4), ended.err
    assert len(lines(ended.err)) == 1, ended.err
    assert "Traceback" not in ended.err
    if search.path.exists() and (search.path / "config.yaml").exists():
        assert unfinished_files(search.path) == []
        assert search.resume().code == 0
    else:
        assert search().code == 0
    assert outcome(search.path) == calm["outcome"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")
@pytest.mark.parametrize("kilobytes", [200, 500, 900])
def test_a_really_full_file_system(nursery, folder, calm, tmp_path, kilobytes):
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(small)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not permitted")
    try:
        ended = nursery.run(options(folder, small, "run"), folder / "cache")
        assert ended.code in (2, 4), ended.err
        assert len(lines(ended.err)) == 1, ended.err
        assert unfinished_files(small) == []
        subprocess.run(["mount", "-o", "remount,size=50m", str(small)], check=True)
        again = ["--resume", str(small / "run")]
        again = again if (small / "run" / "config.yaml").exists() else options(folder, small, "run")
        ended = nursery.run(again, folder / "cache")
        assert ended.code == 0, ended.err
        assert outcome(small / "run") == calm["outcome"]
    finally:
        subprocess.run(["umount", str(small)], check=False)


@pytest.mark.slow
def test_a_read_only_directory_is_named(search, tmp_path):
    tmp_path.chmod(0o555)
    try:
        ended = search(obeys_rights=True)
    finally:
        tmp_path.chmod(0o755)
    assert ended.code in (2, 4)
    assert len(lines(ended.err)) == 1, ended.err
    assert "cannot be written" in ended.err or "cannot be created" in ended.err or "rights" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_locked_by_another_process_is_named(nursery, folder, calm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(calm["path"], run)
    (run / "stage3" / "best.json").unlink()
    (run / "summary.json").unlink()  # as if it had not finished
    other = sqlite3.connect(run / "study.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    ended = nursery.run(["--resume", str(run)], folder / "cache", inject="impatient_ledger")
    assert ended.code == 2
    assert len(lines(ended.err)) == 1
    assert "is locked by another process: end that process or wait, then resume" in ended.err
    other.execute("ROLLBACK")
    other.close()
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = nursery.run(["--resume", str(run)], folder / "cache")
    assert (ended.code, len(lines(ended.err))) == (2, 1)
    assert "in use by another process" in ended.err


@pytest.mark.slow
def test_jumping_clocks_change_no_result(search, calm):
    ended = search(inject="jumping_clock")
    assert ended.code == 0, ended.err
    assert outcome(search.path) == calm["outcome"]
    assert all(seconds >= 0 for seconds in json.loads((search.path / "phases.json").read_text()).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [
        "engine.distill.population/PopulationStep._update@3",
        "engine.evaluation.shared/SharedEvaluator.evaluate@1",
        "engine.training.sentinel/Sentinel._undisturbed@1",
    ],
)
def test_without_memory_for_a_candidate_the_search_goes_on_to_the_same_end(search, calm, step):
    ended = search(inject=f"out_of_memory_in:{step}")
    assert ended.code == 0, ended.err
    assert "fault: no memory" in ended.out
    assert outcome(search.path) == calm["outcome"]


@pytest.mark.parametrize(
    "step",
    [
        "search.phases/run_phase@2",
        *(
            pytest.param(step, marks=pytest.mark.slow)
            for step in (
                "search.context.prepared/Teacher.load@1",
                "engine.teacher.finetune/cycle@1",
                "engine.training.optim/AdamW.step@3",
                "engine.distill.distiller/Distiller.targets@2",
                "search.context.models/Models.new_student@1",
                "search.scoring.proxy/extract@1",
                "search.pipeline/evaluate_dev@1",
                "search.derive/extract@1",
                "search.pipeline/export_model@1",
                "search.pipeline/build_report@1",
            )
        ),
    ],
)
def test_without_memory_in_a_phase_the_run_ends_in_one_line_and_resumes(search, calm, step):
    ended = search(inject=f"out_of_memory_in:{step}")
    assert "fault: no memory" in ended.out
    assert ended.code == 4, ended.err
    assert len(lines(ended.err)) == 1
    assert "out of memory: use smaller batches" in ended.err
    begun = (search.path / "config.yaml").exists()
    assert (search.resume() if begun else search()).code == 0
    assert outcome(search.path) == calm["outcome"]


@pytest.mark.parametrize("phase", ["warm-up", pytest.param("derive task", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_ends_in_one_line_with_a_remedy(search, phase):
    ended = search(inject=f"nan_in_loss:{phase}")
    assert ended.code == 2
    assert len(lines(ended.err)) == 1
    assert ended.err.startswith(f"ffnas: error: {phase}: the loss is not finite at step 5")
    assert "smaller learning rate" in ended.err


@pytest.mark.slow
def test_a_single_overflowed_gradient_is_left_out_and_said(search):
    ended = search("--sentinel", "false", inject="infinite_gradient:derive task")
    assert ended.code == 0, ended.err
    assert "derive task: gradients not finite in 1 of 5 steps, left out" in ended.err
    from safetensors.torch import load_file

    weights = load_file(search.path / "best" / "model" / "model.safetensors")
    assert all(t.isfinite().all() for t in weights.values())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_teacher_whose_weights_are_not_finite_is_named(folder, tmp_path, value):
    from safetensors.torch import load_file, save_file

    teacher = tmp_path / "teacher"
    shutil.copytree(folder / "teacher", teacher)
    weights = load_file(teacher / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 5] = value
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'encoder.layer.1.output.dense.weight' holds NaN or infinity.*fetch them"):
        Teacher.load(str(teacher))


@pytest.mark.slow
def test_a_teacher_that_answers_nan_is_named(search):
    ended = search(inject="nan_teacher")
    assert ended.code == 2
    assert len(lines(ended.err)) == 1
    assert "its embeddings are NaN or infinite on the first batch" in ended.err


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["wrong_kernel", "wrong_gradient"])
def test_wrong_kernels_are_noticed_and_the_reference_takes_over(search, calm, fault, monkeypatch):
    monkeypatch.delenv("FFNAS_BACKEND", raising=False)
    ended = search(inject=fault)
    assert ended.code == 0, ended.err
    said = [line for line in lines(ended.out + ended.err) if "sentinel: backend 'cpu' disagrees" in line]
    assert len(said) == 1
    assert "in warm-up" in said[0]
    reference = search("--name", "ref", "--sentinel", "false", inject="reference_only")
    assert reference.code == 0, reference.err
    assert outcome(search.path)["trials"] == outcome(search.path.with_name("ref"))["trials"]
