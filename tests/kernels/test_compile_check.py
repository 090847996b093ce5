"""The compile check and what stands on it: kernels compiled without a GPU, and the processes that do so."""

from __future__ import annotations

import json
import re
import sys
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from kernels.compile_check import __main__ as command
from kernels.compile_check import machine_code, sources, units
from kernels.compile_check.calls import calls, ffn_call, ffn_recipe, sampled_programs
from kernels.compile_check.table import Row, named, summary, table
from kernels.cuda.build import find_nvcc
from kernels.language.lowering import lower
from kernels.triton.compile_pool import CompilePool
from kernels.triton.launch import interpreted, recorded, statistics
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
    recipe = json.loads(ffn_recipe("torch.bfloat16", 180, norm=False))
    recipe["needs"] = [False, False, False, True, False]
    todo = units.triton_units([ffn_call("generated bfloat16", lower(TEXT).words, json.dumps(recipe))], [90])
    found = [row for unit in todo for row in units.run_unit(unit)]
    rows = named(found)
    assert {r.kernel for r in rows} >= {"ffn_linear_kernel", "ffn_linear_bwd_kernel", "ffn_weight_grad_kernel"}
    assert all(r.registers > 0 and r.problem == "" and r.spills == 0 for r in rows)
    assert {r.kernel for r in rows if r.multiplies} == {r.kernel for r in rows if r.tensor_core == "HGMMA"}
    assert len(list((cache / "compile-check").glob("*.json"))) == len(todo)
    assert [row for unit in todo for row in units.run_unit(unit)] == found
    assert named([row for unit in todo for row in units.run_unit(unit)]) == rows


def test_kernels_that_calls_share_are_compiled_once(cache):
    """Two programs of one kind differ in data alone; other dtypes, widths of alignment, or slots make other kernels."""
    recipe = ffn_recipe("torch.bfloat16", 180)
    once = units.triton_units([ffn_call("one", lower(TEXT).words, recipe, slots=2)], [90])
    both = [ffn_call(name, lower(TEXT.replace("gelu", name)).words, recipe, slots=2) for name in ("elu", "tanh")]
    assert {u.key for u in units.triton_units(both, [90])} == {u.key for u in once}
    assert len(units.triton_units(both, [80, 90])) == 2 * len(once)
    for other in (ffn_recipe("torch.float16", 180), ffn_recipe("torch.bfloat16", 135)):
        assert len(units.triton_units([*both, ffn_call("other", lower(TEXT).words, other, slots=2)], [90])) > len(once)


def test_the_key_of_a_launch_is_as_fine_as_tritons(cache):
    """Launches with one key find one compiled kernel: a second compilation of any would be a new variant."""
    recipe = forward(ffn_recipe("torch.bfloat16", 180))
    keys = {launch.key() for name in ("gelu", "elu") for launch in recorded(run(name, recipe))}
    before = statistics.variants
    for name in ("gelu", "elu"):
        compile_recipe(lower(TEXT.replace("gelu", name)).words, recipe, 80, lambda *_: None, generated=False)
    assert statistics.variants - before == len(keys)


def run(name, recipe):
    from kernels.triton.recipe import run_recipe

    return lambda: run_recipe(lower(TEXT.replace("gelu", name)).words, recipe, generated=False)


def test_every_family_has_calls_and_the_full_check_contains_the_quick_one():
    quick, full = calls(True), calls(False)
    assert set(quick) <= set(full)
    names = " ".join(call.name for call in full)
    assert all(word in names for word in ("bfloat16", "float16", "float32", "tf32", "odd supernet view", "generated"))


def test_a_never_seen_expression_compiles_nothing(cache):
    """Programs are data: a second program of the same kind finds every kernel made for the first."""
    recipe = forward(ffn_recipe("torch.bfloat16", 180))
    launched = []
    compile_recipe(lower(TEXT).words, recipe, 90, lambda kernel, *_: launched.append(kernel.__name__), generated=False)
    before = statistics.variants
    assert len(launched) == 3
    for name in ("tanh", "elu", "swish"):
        compile_recipe(lower(TEXT.replace("gelu", name)).words, recipe, 90, lambda *_: None, generated=False)
    assert statistics.variants == before


def test_problems_are_named(monkeypatch):
    ttir = "%c = tt.dot %a, %b, %acc, inputPrecision = {} : tensor<64x64x{}> * tensor<64x64x{}> -> tensor<64x64xf32>"

    def row(usage, precision, dtype, shared=0):
        monkeypatch.setattr(machine_code, "tool", lambda *_: usage)
        asm = {"cubin": b"", "ttir": ttir.format(precision, dtype, dtype)}
        built = SimpleNamespace(asm=asm, metadata=SimpleNamespace(shared=shared))
        return named([units.triton_row("kernel", "interpreted", 90, built)])[0].problem

    assert row("Function f:\n REG:255 STACK:64 SHARED:0", "ieee", "f32") == "spills 64 bytes"
    assert row("REG:255 STACK:0", "tf32", "bf16") == "no tensor-core instruction"
    assert row("REG:255 STACK:0", "ieee", "f16") == "no tensor-core instruction"
    assert row("REG:255 STACK:0", "tf32", "f32") == "no tensor-core instruction"
    assert row("REG:255 STACK:0", "ieee", "f32") == ""
    assert row("REG:9 STACK:0", "ieee", "f32", 2**18) == "needs 262144 bytes of shared memory, sm_90 has 232448"
    with pytest.raises(RuntimeError, match="says nothing"):
        row("", "ieee", "f32")


def test_messages_of_ptxas_become_rows():
    log = """ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers
"""
    code = bytes.fromhex("04c8c23c" + "00" * 12)
    one, two = sources.ptxas_rows("x.cu", 80, log, {"_Z3twoPf": code})
    assert (one.registers, one.spills, one.shared, one.problem) == (40, 12, 512, "spills 12 bytes")
    assert (two.registers, two.spills, two.problem) == (12, 0, "")
    assert list(two.samples.values()) == [code.hex()]
    (three,) = sources.ptxas_rows("x.cu", 80, log.split("_Z3onePf")[0] + "_Z1kI8BFloat16EvT_' for 'sm_80'\n", {})
    assert three.multiplies
    assert named([three])[0].problem == "no tensor-core instruction"


def test_one_instruction_of_a_kind_tells_what_a_whole_disassembly_does(cache, tmp_path):
    recipe = forward(ffn_recipe("torch.float16", 180, norm=False))
    cubins = []
    compile_recipe(
        lower(TEXT).words, recipe, 80, lambda _k, built, _c: cubins.append(built.asm["cubin"]), generated=True
    )
    for k, cubin in enumerate(cubins):
        ((_, code),) = machine_code.kernel_code(cubin)
        found = machine_code.samples(code)
        names = {name.split(".")[0] for name in machine_code.mnemonics(found, 80).values()}
        path = tmp_path / f"{k}.cubin"
        path.write_bytes(cubin)
        text = machine_code.tool("nvdisasm", "-c", str(path))
        whole = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text)
        assert names == set(whole)


@pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")
def test_a_source_that_does_not_compile_fails_the_check(cache, tmp_path, monkeypatch, capsys):
    source = tmp_path / "broken.cu"
    source.write_text("__global__ void f() { nonsense; }")
    todo = units.file_units([source], [80])
    (row,) = units.run_unit(todo[0])
    assert "nonsense" in row.problem
    assert not list(cache.glob("compile-check/*"))
    monkeypatch.setattr(command, "work", lambda *_: todo)
    assert command.main(["--jobs", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_the_table_is_sorted_and_aligned():
    lines = table([Row("b", "v", 90, 10), Row("a", "longer", 80, 128, problem="spills 8 bytes")]).splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "a", "b"]
    assert lines[1].endswith("FAILED: spills 8 bytes")
    assert lines[0].index("arch") == lines[1].index("sm_80") == lines[2].index("sm_90")


def test_the_summary_has_the_worst_of_every_kind():
    kernels = [
        Row("k", "interpreted a", 80, 100, 0, 64),
        Row("k", "interpreted b", 80, 90, 8, 128, problem="spills 8 bytes"),
    ]
    _, line = summary(kernels).splitlines()
    assert line.split() == ["k", "interpreted", "sm_80", "2", "100", "8", "128", "-", "1", "FAILED"]


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
    recipe = forward(ffn_recipe("torch.bfloat16", 180))
    bad = ask(pool, {"words": [1, 2, 3], "recipe": recipe, "arch": 90})
    assert bad.startswith("compiling a program failed")
    assert "\n" not in bad
    assert ask(pool, {"words": list(lower(TEXT).words), "recipe": recipe, "arch": 90}) is None


def test_a_background_process_that_dies_is_reported_and_replaced():
    pool = CompilePool(processes=1, command=(sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(7)"))
    for _ in range(2):
        assert "exit code 7" in ask(pool, {"words": [], "recipe": {}, "arch": 90})
