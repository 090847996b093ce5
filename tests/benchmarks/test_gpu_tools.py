"""The tools of `make gpu-check`, as far as they go without a GPU: report, README, budget, what is compiled ahead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from random import Random

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_check, gpu_report
from benchmarks.ffn_cases import RELEASED, Case, inputs
from benchmarks.gpu_cases import BASELINES, OURS, floor
from kernels import lower
from kernels.triton.launch import recorded

MEASURED = {"date": "2026-01-01T00:00:00+00:00", "device": "NVIDIA H100", "torch": "2.13"}


def result(device="NVIDIA H100"):
    """Two cases: ours take 1 or 2 us, the others 3 us; one side could not run."""
    rows = []
    for backward in (False, True):
        case = Case(RELEASED[0], "bf16", 540, 8192, backward, device="cuda")
        seconds = dict.fromkeys(BASELINES, 3e-6) | dict.fromkeys(OURS, 2e-6 if backward else 1e-6) | {"floor": 5e-7}
        del seconds["liger"]
        rows.append({**vars(case), "seconds": seconds, "refused": {"liger": "not installed"}})
    rows[1]["seconds"]["eager"] = 1e-6
    group = {"seconds": {"one launch": 1e-6, "eight calls, cuda stack": 4e-6}, "refused": {}}
    unseen = {"expressions": 9, "median_ms": 1.0, "p95_ms": 2.0, "worst_ms": 3.0, "compilations": 0}
    return {
        "environment": {**MEASURED, "device": device}, "ffn": rows, "left_out": 3, "never_seen": unseen,
        "grouped": {"members": 8, "tokens": 1024, "forward": group, "forward + backward": group},
        "repeated": dict.fromkeys(OURS, "same bits"), "agreement": dict.fromkeys(OURS, 1e-3), "problems": {"x": "why"},
    }  # fmt: skip


def test_the_report_has_ratios_losing_cases_and_reasons():
    text = gpu_report.markdown(result())
    assert "| triton specialized | 3.00 (3.00) | 3.00 (3.00) | 3.00 (3.00) | - | 0.50 (0.50) |" in text
    assert "- cuda stack 0.50 of eager: bf16 fwd+bwd d=540" in text
    assert "3 cases were left out" in text
    assert "- liger: not installed" in text
    assert "eight calls, cuda stack 4.00" in text
    assert "0 compilations" in text
    assert "x could not be measured: why" in text


def test_readme_takes_a_measurement_between_its_marks_only(tmp_path, monkeypatch, capsys):
    readme, file = tmp_path / "README.md", tmp_path / "result.json"
    monkeypatch.setattr(gpu, "README", readme)
    readme.write_text(f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n")
    file.write_text(json.dumps(result()))
    assert gpu.main(["--readme", str(file)]) == 0
    once = readme.read_text()
    assert once.startswith("before\n")
    assert once.endswith(f"{gpu_report.END}\nafter\n")
    assert "NVIDIA H100" in once
    assert "old" not in once
    assert gpu.main(["--readme", str(file)]) == 0
    assert readme.read_text() == once
    file.write_text(json.dumps(result("STUB, NOT A MEASUREMENT")))
    assert gpu.main(["--readme", str(file)]) == 2
    assert "only measurements" in capsys.readouterr().err
    assert readme.read_text() == once
    assert gpu.main(["--show", str(tmp_path / "none.json")]) == 2


def test_this_readme_has_the_marks():
    text = gpu.README.read_text()
    assert gpu_report.BEGIN in text
    assert gpu_report.END in text


def test_the_floor_counts_products_and_bytes():
    case = Case(RELEASED[0], "bf16", 270, 1000, False)
    work, size = 4 * 1000 * 540 * 270, 2 * (2 * 1000 * 540 + 2 * 540 * 270)
    assert floor(case, 1e3, 1e30) == pytest.approx(work / 1e3)
    assert floor(case, 1e30, 1e3) == pytest.approx(size / 1e3)


def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path, capfd):
    late = tmp_path / "late"
    start = time.monotonic()
    assert not gpu_check.run(gpu_check.Step("slow", ["bash", "-c", f"(sleep 1; touch {late}) & wait"], 0.3), 100)
    assert not gpu_check.run(gpu_check.Step("late", [sys.executable, "-c", ""], 10, reserve=5), 4)
    assert time.monotonic() - start < 1
    time.sleep(1)
    assert not late.exists()
    out = capfd.readouterr().out
    assert "took more than" in out
    assert "the time is up" in out


def test_the_limits_of_all_steps_fit_the_budget(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: "compute-sanitizer")
    left = gpu_check.BUDGET
    for step in gpu_check.steps(True):
        limit = min(step.limit, left - step.reserve)
        assert limit >= 20, step.name
        left -= limit
    assert left >= 0


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_compiled_ahead_is_what_a_call_launches(backward, monkeypatch):
    from benchmarks import gpu_warm
    from kernels.call import FFNCall
    from kernels.triton import ffn
    from kernels.triton.specialize import program_of

    for mode in ("0", "always"):
        monkeypatch.setenv("FFNAS_SPECIALIZE", mode)
        case = Case(RELEASED[3], "bf16", 135, 256, backward)
        ahead = {launch.key() for call in gpu_warm.calls([case]) for launch in recorded(call.run)}
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
    from benchmarks import gpu_warm
    from benchmarks.cold import random_text
    from kernels import ExpressionError
    from kernels.compile_check.call import Call

    monkeypatch.setenv("FFNAS_SPECIALIZE", "0")
    case = Case(RELEASED[0], "bf16", 270, 8192, False)
    ahead = {launch.key() for call in gpu_warm.any_expression(case) for launch in recorded(call.run)}
    rng, found = Random(3), 0
    while found < 40:
        try:
            program = lower(random_text(rng))
        except ExpressionError:
            continue
        if program.rule.allows(540, 270):
            found += 1
            recipe = json.dumps(gpu_warm._recipe(case, program, None))
            call = Call("unseen", gpu_warm._forward, (program.words, recipe, 0))
            assert {launch.key() for launch in recorded(call.run)} <= ahead, program


@pytest.mark.slow
def test_a_rehearsal_runs_every_side_and_check(tmp_path):
    """All of the benchmark's code on a CPU: Triton's interpreter, and the emulation of the CUDA kernels; minutes."""
    tests = os.path.join(os.path.dirname(os.path.dirname(__file__)), "kernels")
    code = f"""
import sys
sys.path.insert(0, {tests!r})
from cuda_emulation import emulation_path
from benchmarks import gpu
from kernels.cuda import library
with library.emulated(emulation_path()):
    gpu.main({[*gpu_check.REHEARSAL, "--out", str(tmp_path)]!r})
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("*.json")
    made = json.loads(file.read_text())
    assert "STUB" in made["environment"]["device"]
    assert made["problems"] == {}
    assert made["repeated"] == dict.fromkeys(OURS, "same bits")
    assert made["never_seen"]["compilations"] == 0
    assert set(made["agreement"]) == set(OURS)
    assert {*OURS, "eager"} <= set(made["ffn"][0]["seconds"])
    for direction in ("forward", "forward + backward"):
        assert made["grouped"][direction]["refused"] == {}
