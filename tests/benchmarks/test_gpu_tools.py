"""The tools of `make gpu-check`, as far as they go without a GPU: records, report, README, limits, tiles, what is
compiled ahead, and which tests are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_check
from benchmarks.ffn_cases import RELEASED, Case, inputs
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import accuracy, launches, records, report
from benchmarks.gpu.scale import DEVICE, REHEARSAL
from benchmarks.gpu.sides import BASELINES, OURS, floor
from kernels import lower
from kernels.triton import tuning
from kernels.triton.launch import recorded

ROOT = Path(__file__).resolve().parents[2]
MEASURED = {"date": "2026-01-01T00:00:00+00:00", "device": "NVIDIA H100", "torch": "2.13"}


def results(device="NVIDIA H100"):
    """Two cases: ours take 1 or 2 us, the others 3 us; one side could not run."""
    lines = [{"family": "machine", "case": "environment", "state": "done", **MEASURED, "device": device}]
    for backward in (False, True):
        case = Case(RELEASED[0], "bf16", 540, 8192, backward, device="cuda")
        seconds = dict.fromkeys(BASELINES, 3e-6) | dict.fromkeys(OURS, 2e-6 if backward else 1e-6) | {"floor": 5e-7}
        del seconds["liger"]
        if backward:
            seconds["eager"] = 1e-6
        both = {"seconds": seconds, "ungraphed": dict.fromkeys(OURS, 9e-6) | {"eager": 8e-6}}
        refused = {"liger": "not installed"}
        lines.append({"family": "ffn", "case": str(case), "state": "done", **vars(case), **both, "refused": refused})
    group = {"seconds": {"one launch": 1e-6, "a call each, cuda stack": 4e-6}, "refused": {}}
    unseen = {"expressions": 9, "median_ms": 1.0, "p95_ms": 2.0, "worst_ms": 3.0, "compilations": 0}
    grouped = {"members": 8, "tokens": 1024, "forward": group, "forward + backward": group}
    errors = {"wrong": {"cuda rows": ["w1"], "cuda stack": []}}
    more = [("checks", "grouped", grouped), ("checks", "never seen", unseen), ("accuracy", "case", errors)]
    more += [("tests 0/2", "a::b", {}), ("tests 1/2", "a::c", {"state": "failed", "reason": "no"})]
    lines += [{"family": family, "case": case, "state": "done", **found} for family, case, found in more]
    return [*lines, {"family": "tiles", "case": "x", "state": "crashed", "reason": "why"}]


def test_the_report_has_ratios_losing_cases_and_reasons():
    text = report.markdown(results())
    assert "| triton specialized | 3.00 (3.00) | 3.00 (3.00) | 3.00 (3.00) | - | 0.50 (0.50) |" in text
    assert "- cuda stack 0.50 of eager: bf16 fwd+bwd T=8192 d=540" in text
    assert "- cuda stack 0.89 of eager, without a graph: bf16 fwd T=8192 d=540" in text
    assert "- liger: not installed" in text
    assert "a call each, cuda stack 4.00" in text
    assert "0 compilations" in text
    assert "- tests: 1 done, 1 failed" in text
    assert "- test failed: a::c: no" in text
    assert "- too large an error: case, cuda rows: w1" in text
    assert "- accuracy: 1 of 2 results within the rule" in text
    assert "- tiles, x: crashed: why" in text


def test_readme_takes_a_measurement_between_its_marks_only(tmp_path, monkeypatch, capsys):
    readme, file = tmp_path / "README.md", tmp_path / records.NAME

    def write(lines):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(gpu, "README", readme)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    write(results())
    assert gpu.main(["--readme", str(tmp_path)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith(f"{report.END}\nafter\n")
    assert "NVIDIA H100" in once
    assert "old" not in once
    assert gpu.main(["--readme", str(tmp_path)]) == 0
    assert readme.read_text() == once
    write(results("STUB, NOT A MEASUREMENT"))
    assert gpu.main(["--readme", str(tmp_path)]) == 2
    assert "only measurements" in capsys.readouterr().err
    assert readme.read_text() == once
    assert gpu.main(["--show", str(tmp_path / "none")]) == 2


def test_this_readme_has_the_marks():
    text = gpu.README.read_text()
    assert report.BEGIN in text
    assert report.END in text


def test_the_floor_counts_products_and_bytes():
    case = Case(RELEASED[0], "bf16", 270, 1000, False)
    work, size = 4 * 1000 * 540 * 270, 2 * (2 * 1000 * 540 + 2 * 540 * 270)
    assert floor(case, 1e3, 1e30) == pytest.approx(work / 1e3)
    assert floor(case, 1e30, 1e3) == pytest.approx(size / 1e3)


FAMILY = """
import os, sys
from pathlib import Path
from benchmarks.gpu import records
own = records.Records(Path({path!r}), "toy")
records.usable = lambda: not broken
broken = False
def bad():
    raise ValueError("a reason")
def sticky():
    global broken
    broken = True
    raise RuntimeError("an illegal access")
def sides():
    found = []
    for name in ("a", "b", "c"):
        if own.attempt("sides", name):
            if name == "b":
                os.kill(os.getpid(), 9)
            found.append(name)
    own.attempt("sides", None)
    return {{"sides": found}}
own.case("good", lambda: {{"value": 1}})
own.case("bad", bad)
own.case("sticky", sticky)
own.case("sides", sides)
own.case("killed", lambda: os.kill(os.getpid(), 11))
own.case("last", lambda: {{"value": 2}})
"""


def test_a_family_goes_on_behind_the_case_it_died_in(tmp_path, capfd):
    """A sticky error and two signals: each costs its case, or the side it was in, and nothing else."""
    path = tmp_path / records.NAME
    step = gpu_check.Step("toy", (sys.executable, "-c", FAMILY.format(path=str(path))), 250)
    assert not gpu_check.run(step, tmp_path)
    assert "ok, after it died 3 times" in capfd.readouterr().out
    ends = {line["case"]: line for line in records.ended(records.read(path), "toy")}
    assert {case: line["state"] for case, line in ends.items()} == {
        "good": "done", "bad": "failed", "sticky": "failed", "sides": "done", "killed": "crashed", "last": "done",
    }  # fmt: skip
    assert ends["bad"]["reason"] == "ValueError: a reason"
    assert ends["sides"]["sides"] == ["a", "c"]
    assert sum(line.get("case") == "good" for line in records.read(path)) == 2
    assert {f.name for f in tmp_path.iterdir()} == {records.NAME, "steps.log"}


def test_a_half_written_line_is_left_out(tmp_path):
    path = tmp_path / records.NAME
    records.append(path, {"family": "toy", "case": "a", "state": "done"})
    with open(path, "a") as stream:
        stream.write('{"family": "toy", "ca')
    assert len(records.read(path)) == 1


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path, capfd):
    late = tmp_path / "late"
    start = time.monotonic()
    step = gpu_check.Step("slow", ["bash", "-c", f"echo seen; (sleep 2; touch {late}) & wait"], 0.5, copies=2)
    assert not gpu_check.run(step, tmp_path)
    assert time.monotonic() - start < 2
    time.sleep(2)
    assert not late.exists()
    assert "took more than" in capfd.readouterr().out
    assert (tmp_path / "steps.log").read_text().count("seen") == 2
    (line,) = records.read(tmp_path / records.NAME)
    assert line["state"].startswith("took more than")


def test_the_limits_of_all_steps_are_eight_minutes_and_the_files_few(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: "compute-sanitizer")
    todo = gpu_check.steps(tmp_path)
    assert sum(step.limit for step in todo) <= 480
    assert set(gpu.FAMILIES) <= {step.name for step in todo} == {s.name for s in gpu_check.dry_steps(tmp_path)} | {
        "build", "memcheck", "racecheck",
    }  # fmt: skip
    assert len({step.log for step in todo} | {records.NAME, "report.md", launches.TILES}) <= 8


TOY_TESTS = """
import time
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_hangs(): time.sleep(60)
@pytest.mark.parametrize("k", range(3))
def test_more(k): pass
"""


def test_tests_are_recorded_each_with_a_limit_and_shared(tmp_path, capfd):
    file, path = tmp_path / "test_toy.py", tmp_path / records.NAME
    file.write_text(TOY_TESTS)
    environment = {**gpu_check.PLAIN, "FFNAS_RECORDS": str(path), "FFNAS_TEST_LIMIT": "1"}
    command = (sys.executable, "-m", "pytest", "-v", "--tb=line", *gpu_check.RECORDED, "-c", os.devnull, str(file))
    assert not gpu_check.run(gpu_check.Step("tests", command, 250, 2, environment, "tests.log"), tmp_path)
    assert "after it died 1 times" in capfd.readouterr().out
    lines = [line for line in records.read(path) if str(line["family"]).startswith("tests ")]
    ends = {line["case"].rpartition("::")[2]: line for line in lines if line["state"] != "began" and "case" in line}
    assert {name: line["state"] for name, line in ends.items()} == {
        "test_good": "done", "test_bad": "failed", "test_skipped": "skipped", "test_hangs": "failed",
        "test_more[0]": "done", "test_more[1]": "done", "test_more[2]": "done",
    }  # fmt: skip
    assert "1 == 2" in ends["test_bad"]["reason"]
    assert "more than 1 s" in ends["test_hangs"]["reason"]
    assert "not here" in ends["test_skipped"]["reason"]
    assert "PASSED" in (tmp_path / "tests.log").read_text()


def test_every_file_with_gpu_tests_is_run():
    marks = ("mark.gpu", "import GPU, INTERPRETER", "triton_device")
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if f != Path(__file__)]
    marked = {str(f.relative_to(ROOT)) for f in files if any(mark in f.read_text() for mark in marks)}
    assert marked == set(gpu_check.TESTS)


@pytest.mark.parametrize("hidden", [False, True])
def test_hidden_packages_are_not_found(hidden):
    code = "import importlib.util as u, json; print(u.find_spec('optuna') is None, u.find_spec('json') is None)"
    folder = str(ROOT / "benchmarks/gpu/hidden")
    environment = {**os.environ, "PYTHONPATH": folder, "FFNAS_HIDDEN": "optuna,datasets" if hidden else ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(hidden), "False"]


def test_errors_beyond_the_rule_are_named():
    exact = [torch.ones(4, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    near, gone = torch.ones(4) * 1.001, torch.tensor([1.0, float("nan"), 1.0])
    own = accuracy.errors([near, gone], exact)
    assert own == [pytest.approx(1e-3, rel=1e-3), float("inf")]
    assert accuracy.too_large(own, [0.0, 0.0], "bf16", ("a", "b")) == ["b"]
    assert accuracy.too_large(own, [0.0, 0.0], "fp32", ("a", "b")) == ["a", "b"]
    with accuracy.poisoned():
        assert torch.empty(5).isnan().all()


def test_sizes_include_long_batches_bert_and_autocast():
    cases = DEVICE.ffn()
    assert {(768, 3072), (540, 540), (540, 135)} <= {(c.hidden, c.inner) for c in cases}
    assert {1024, 8192, 32768} == {c.tokens for c in cases}
    assert any(c.autocast for c in cases)
    assert {(c.hidden, c.inner) for c in DEVICE.exact()} >= {(768, 3072), (540, 540), (540, 135)}
    assert all(c.backward for c in DEVICE.exact())
    assert len(DEVICE.shapes()) == 6


def test_a_sweeps_tiles_are_loaded_as_package_data(tmp_path, monkeypatch):
    """The fastest by the geometric mean; what ran in some shapes only, or not at all, is out."""
    fast, slow, some = ([64, 64, 64, 2, 8, 3], [128, 64, 64, 4, 8, 3], [256, 64, 64, 4, 8, 3])
    path, key = tmp_path / records.NAME, "linear torch.bfloat16 2 narrow"
    for k, times in enumerate(((1.0, 3.0, 0.5), (4.0, 2.0, "out of resources"))):
        labels = {json.dumps(c): t for c, t in zip((fast, slow, some), times, strict=True)}
        records.append(path, {"family": "tiles", "case": str(k), "state": "done", "families": {key: labels}})
    launches.write_tiles(path, tmp_path / "sm_90.json", REHEARSAL)
    assert tuning.measured(90, tmp_path) == {key: tuning.Gemm(*fast)}
    assert tuning.measured(80, tmp_path) == {}
    (tmp_path / "sm_75.json").write_text('{"tiles": {"linear": [64, 0]}}')
    with pytest.raises(ValueError, match="not a file of measured tiles"):
        tuning.measured(75, tmp_path)
    of = tuning.family("linear", torch.bfloat16, 2, 270)
    assert of.key() == key
    monkeypatch.setattr(tuning, "measured", lambda arch: {key: tuning.Gemm(*fast)} if arch == 90 else {})
    monkeypatch.setattr(tuning, "architecture", lambda: 90)
    assert tuning.shipped(of) == tuning.Gemm(*fast)
    assert tuning.candidates(of)[0] == tuning.Gemm(*fast)
    monkeypatch.setattr(tuning, "architecture", lambda: 80)
    assert tuning.shipped(of) == tuning.reasoned(of)


def test_committed_tiles_fit_their_families():
    """Their depth is that of the reasoned ones: results must not depend on the tiles."""
    families = [
        tuning.Family(kind, dtype, slots, wide)
        for kind, bits in tuning._REASONED
        for dtype in ((torch.float32,) if bits == 32 else (torch.bfloat16, torch.float16))
        for slots in tuning._REASONED[kind, bits]
        for wide in (False, True)
    ]
    known = {of.key(): of for of in families}
    for of in families:
        assert {c.depth for c in tuning.candidates(of)} == {tuning.reasoned(of).depth}
    for file in tuning.TILES.glob("sm_*.json"):
        for key, tile in tuning.measured(int(file.stem[3:])).items():
            assert tile.depth == tuning.reasoned(known[key]).depth, key


def test_a_sweep_runs_every_candidate(monkeypatch):
    monkeypatch.setenv("FFNAS_SPECIALIZE", "0")
    from benchmarks.gpu import warm

    case = DEVICE.shapes()[0]
    (call,) = list(launches.sweep_calls(DEVICE, lambda _: warm.tiered([case])))[1:2]
    launched = recorded(call.run)
    family = tuning.family("linear", torch.bfloat16, 2, 540)
    wanted = {(c.rows, c.columns, c.warps, c.stages) for c in tuning.candidates(family)}
    own = {
        (x.constants["BM"], x.constants["BN"], x.warps, x.stages)
        for x in launched
        if x.kernel.__name__ == "ffn_linear_kernel" and x.constants["SLOTS"] == 2
    }
    assert own == wanted
    assert len(own) >= 6


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_compiled_ahead_is_what_a_call_launches(backward, monkeypatch):
    from benchmarks.gpu import warm
    from kernels.call import FFNCall
    from kernels.triton import ffn
    from kernels.triton.specialize import program_of

    for mode in ("0", "always"):
        monkeypatch.setenv("FFNAS_SPECIALIZE", mode)
        case = Case(RELEASED[3], "bf16", 135, 256, backward)
        ahead = {launch.key() for call in warm.calls([case]) for launch in recorded(call.run)}
        x, *rest = (t.detach() for t in inputs(case))
        program = lower(case.expression)
        call = FFNCall(x, *([t] for t in rest), program.tensor, int(program.flags), 0.0, None, 1e-12, torch.bfloat16)
        launches = recorded(lambda call=call: ffn.forward(call, backward, program_of(call, backward)))
        if backward:
            needs = [True] * 7
            launches += recorded(
                lambda call=call, needs=needs: ffn.backward(
                    call, call.x, ffn.saved_like(call), needs, program_of(call, True, needs)
                )
            )
        assert len(launches) >= 3
        assert {launch.key() for launch in launches} <= ahead


def test_all_kernels_of_never_seen_expressions_are_compiled_ahead(monkeypatch):
    from benchmarks.cold import random_text
    from benchmarks.gpu import warm
    from kernels import ExpressionError
    from kernels.compile_check.call import Call

    monkeypatch.setenv("FFNAS_SPECIALIZE", "0")
    case = Case(RELEASED[0], "bf16", 270, 8192, False)
    ahead = {launch.key() for call in warm.any_expression(case) for launch in recorded(call.run)}
    rng, found = Random(3), 0
    while found < 40:
        try:
            program = lower(random_text(rng))
        except ExpressionError:
            continue
        if program.rule.allows(540, 270):
            found += 1
            recipe = json.dumps(warm._recipe(case, program, None))
            call = Call("unseen", warm._forward, (program.words, recipe, 0))
            assert {launch.key() for launch in recorded(call.run)} <= ahead, program


@pytest.mark.slow
def test_a_rehearsal_runs_every_side_and_check(tmp_path):
    """The FFN's families on a CPU: Triton's interpreter, and the emulation of the CUDA kernels; minutes."""
    tests = os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernels")
    code = f"""
import sys
sys.path.insert(0, {tests!r})
from cuda_emulation import emulation_path
from benchmarks.gpu import __main__ as gpu
from kernels.cuda import library
with library.emulated(emulation_path()):
    for family in ("accuracy", "ffn", "checks"):
        gpu.main([family, "--rehearse", "--out", {str(tmp_path)!r}])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = records.read(tmp_path / records.NAME)
    assert all(line["state"] in ("began", "done") for line in lines)
    ends = {line["case"]: line for line in lines if line["state"] == "done"}
    assert ends["repeated"]["bits"] == dict.fromkeys(OURS, "same bits")
    assert ends["never seen"]["compilations"] == 0
    for line in records.ended(lines, "accuracy"):
        assert all(not wrong for wrong in line["wrong"].values())
        assert line.get("refused", {}) == {}
    for line in records.ended(lines, "ffn"):
        assert {*OURS, "eager"} <= set(line["seconds"])
        assert {*OURS, "eager"} <= set(line["ungraphed"])
    for direction in ("forward", "forward + backward"):
        assert ends["grouped"][direction]["refused"] == {}
