"""The compile check and what stands on it: kernels compiled without a GPU, and the processes that do so."""

from __future__ import annotations

import json
import sys
import threading
from types import MappingProxyType

import pytest

pytest.importorskip("triton")

from kernels import compile_check
from kernels.compile_check import Job, Row, find_nvcc, main, run_job, sampled_programs, table
from kernels.lowering import lower
from kernels.triton.compile_pool import CompilePool
from kernels.triton.launch import interpreted, statistics
from kernels.triton.primitives import reciprocal
from kernels.triton.recipe import compile_recipe

TEXT = "linear(gelu(linear(x,wb1)),wb2)"
pytestmark = pytest.mark.skipif(interpreted(reciprocal), reason="nothing is compiled under Triton's interpreter")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    return tmp_path


def forward(recipe):
    return {**json.loads(recipe), "needs": None, "save": False}


def test_a_call_is_compiled_read_and_remembered(cache):
    recipe = json.loads(compile_check._recipe("torch.bfloat16", 180, norm=False))
    recipe["needs"] = [False, False, False, True, False]
    job = Job("generated bfloat16", 90, lower(TEXT).words, json.dumps(recipe), generated=True)
    rows = run_job(job)
    assert {r.kernel for r in rows} >= {"ffn_linear_kernel", "ffn_linear_bwd_kernel", "ffn_weight_grad_kernel"}
    assert all(r.registers > 0 and r.problem == "" and r.spills == 0 for r in rows)
    assert all(r.tensor_core == "HGMMA" for r in rows if r.kernel == "ffn_linear_kernel")
    assert len(list((cache / "compile-check").glob("*.json"))) == 1
    assert run_job(job) == rows


def test_a_never_seen_expression_compiles_nothing(cache):
    """Programs are data: a second program of the same kind finds every kernel made for the first."""
    recipe = forward(compile_check._recipe("torch.bfloat16", 180))
    launched = []
    compile_recipe(lower(TEXT).words, recipe, 90, lambda kernel, *_: launched.append(kernel.__name__), generated=False)
    before = statistics.variants
    assert len(launched) == 3
    for name in ("tanh", "elu", "swish"):
        compile_recipe(lower(TEXT.replace("gelu", name)).words, recipe, 90, lambda *_: None, generated=False)
    assert statistics.variants == before


def test_problems_are_named(monkeypatch):
    class Built:
        asm = MappingProxyType({"cubin": b""})
        metadata = type("", (), {"shared": 0})
        hash = "x"

    answers = {"cuobjdump": "Function f:\n REG:255 STACK:64 SHARED:0", "nvdisasm": "FFMA R0, R1, R2, R3"}
    monkeypatch.setattr(compile_check, "_tool", lambda name, *_: answers[name])
    job = Job("interpreted bfloat16", 90)
    assert compile_check._row(job, "ffn_rows_kernel", Built, {"warps": 4}).problem == "spills 64 bytes"
    assert compile_check._row(job, "ffn_linear_kernel", Built, {"warps": 4}).problem == "no tensor-core instruction"
    exact = {"warps": 4, "PRECISION": "ieee"}
    answers["cuobjdump"] = "REG:255 STACK:0"
    assert compile_check._row(Job("interpreted float32", 90), "ffn_linear_kernel", Built, exact).problem == ""


def test_messages_of_ptxas_become_rows():
    log = """ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""
    one, two = compile_check._ptxas_rows(Job("x.cu", 80, source="x.cu"), log, ".text._Z3twoPf:\n HMMA.16816 R0\n")
    assert (one.registers, one.spills, one.shared, one.problem) == (40, 12, 512, "spills 12 bytes")
    assert (two.registers, two.spills, two.tensor_core, two.problem) == (12, 0, "HMMA", "")


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_a_source_that_does_not_compile_fails_the_check(cache, tmp_path, monkeypatch, capsys):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { nonsense; }")
    (row,) = run_job(Job("broken.cu", 80, source=str(source)))
    assert "nonsense" in row.problem
    assert not list(cache.glob("compile-check/*"))
    monkeypatch.setattr(compile_check, "triton_jobs", lambda *_: [])
    monkeypatch.setattr(compile_check, "cuda_jobs", lambda *_: [Job("broken.cu", 80, source=str(source))])
    assert main(["--jobs", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_table_is_sorted_and_aligned():
    lines = table([Row("b", "v", 90, 10), Row("a", "longer", 80, 128, problem="spills 8 bytes")]).splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "a", "b"]
    assert lines[1].endswith("FAILED: spills 8 bytes")
    assert lines[0].index("arch") == lines[1].index("sm_80") == lines[2].index("sm_90")


def test_sampled_programs_are_valid_and_always_the_same():
    assert sampled_programs(20) == sampled_programs(20)
    assert {policy for _, policy in sampled_programs(20)} == {"truncate", "pad"}


def ask(pool, job, timeout=120):
    """The pool's answer to a job."""
    answers, done = [], threading.Event()

    def finished(error):
        answers.append(error)
        done.set()

    pool.submit(job, finished)
    assert done.wait(timeout)
    return answers[0]


def test_a_background_process_compiles_and_survives_a_bad_job(cache):
    pool = CompilePool(processes=1)
    recipe = forward(compile_check._recipe("torch.bfloat16", 180))
    bad = ask(pool, {"words": [1, 2, 3], "recipe": recipe, "arch": 90})
    assert bad.startswith("compiling a program failed")
    assert "\n" not in bad
    assert ask(pool, {"words": list(lower(TEXT).words), "recipe": recipe, "arch": 90}) is None


def test_a_background_process_that_dies_is_reported_and_replaced():
    pool = CompilePool(processes=1, command=(sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"))
    for _ in range(2):
        assert "exit code 7" in ask(pool, {"words": [], "recipe": {}, "arch": 90})
