"""When a call moves from interpreting to generated kernels, and what happens when compiling fails.

Nothing is launched: the choice is made before, from tensors of any device. The background pool is a stand-in.
"""

from __future__ import annotations

import warnings

import pytest
import torch

pytest.importorskip("triton")

from kernels.call import FFNCall
from kernels.language.lowering import lower
from kernels.triton import specialize
from kernels.triton.ahead import compile_ahead, programs
from kernels.triton.device_program import ProgramBuffer
from kernels.triton.evaluate import interpret
from kernels.triton.launch import interpreted, statistics
from kernels.triton.specialize import THRESHOLD, SpecializationWarning, program_of

TEXT = "linear(gelu(linear(x,wb1)),wb2)"
pytestmark = pytest.mark.skipif(interpreted(interpret), reason="the interpreter has no compiled kernels to choose from")


class Pool:
    """Keeps jobs until the test answers them."""

    def __init__(self):
        self.jobs = []

    def submit(self, job, finished):
        self.jobs.append((job, finished))


@pytest.fixture
def pool(monkeypatch, tmp_path):
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    monkeypatch.setenv(specialize.ENVIRONMENT, "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stand_in = Pool()
    monkeypatch.setattr(specialize, "_pool", stand_in)
    specialize.clear()
    yield stand_in
    specialize.clear()


def call(text=TEXT, width=16):
    program = lower(text)
    shapes = ((4, 16), (width, 16), (width,), (16, width), (16,))
    x, *parameters = (torch.zeros(s) for s in shapes)
    return FFNCall(
        x, *([p] for p in parameters), [], [], program.tensor, int(program.flags), 0.0, None, 1e-12, torch.float32
    )  # fmt: skip


def is_generated(c):
    return program_of(c, False).generated is not None


def test_a_program_is_compiled_once_after_many_calls(pool):
    c = call()
    assert not any(is_generated(c) for _ in range(3 * THRESHOLD))
    ((job, finished),) = pool.jobs
    assert job["arch"] == 90
    assert tuple(job["words"]) == lower(TEXT).words
    finished(None)
    assert is_generated(c)
    assert not is_generated(call(width=8))  # another shape family
    assert not is_generated(call(TEXT.replace("gelu", "elu")))


def test_a_failed_compilation_is_reported_once(pool):
    c = call()
    for _ in range(THRESHOLD):
        program_of(c, False)
    pool.jobs[0][1]("compiling a program failed: out of luck")
    with pytest.warns(SpecializationWarning, match="out of luck"):
        assert not is_generated(c)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_generated(c)


def test_generated_kernels_first_run_outside_a_capture(pool, monkeypatch):
    c = call()
    for _ in range(THRESHOLD):
        program_of(c, False)
    pool.jobs[0][1](None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not is_generated(c)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert is_generated(c)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_generated(c)


def test_the_environment_decides(pool, monkeypatch):
    monkeypatch.setenv(specialize.ENVIRONMENT, "always")
    assert is_generated(call())
    monkeypatch.setenv(specialize.ENVIRONMENT, "0")
    assert not any(is_generated(call()) for _ in range(2 * THRESHOLD))
    monkeypatch.delenv(specialize.ENVIRONMENT)  # never measured on a device, so off
    assert not any(is_generated(call()) for _ in range(2 * THRESHOLD))
    assert not pool.jobs
    monkeypatch.setenv(specialize.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="FFNAS_SPECIALIZE"):
        is_generated(call())


def test_a_program_in_a_buffer_is_never_specialized(pool, monkeypatch):
    monkeypatch.setenv(specialize.ENVIRONMENT, "always")
    with ProgramBuffer(lower(TEXT), "cpu"):
        assert not is_generated(call())
    assert is_generated(call())


def test_unaligned_tensors_stay_with_the_interpreting_kernels(pool):
    c = call()
    c.x = torch.zeros(4, 17).flatten()[1:65].view(4, 16)
    assert not any(is_generated(c) for _ in range(2 * THRESHOLD))
    assert not pool.jobs


@pytest.mark.slow
def test_after_compiling_ahead_no_form_of_expression_compiles_anything(monkeypatch, tmp_path):
    """About 40 kernels are compiled, and then none for expressions of other operators."""
    x, w1, b1, w2, b2 = (torch.zeros(s) for s in ((4, 16), (16, 16), (16,), (16, 16), (16,)))
    program = lower(TEXT)
    like = FFNCall(x, [w1], [b1], [w2], [b2], [], [], program.tensor, int(program.flags), 0.0, None, 1e-12, x.dtype)
    assert compile_ahead(like, arch=90) > 0
    before = statistics.variants
    monkeypatch.setattr(
        "kernels.triton.ahead.programs", lambda: [lower(str(p.expression).replace("gelu", "elu")) for p in programs()]
    )
    assert compile_ahead(like, arch=90) > 0
    assert statistics.variants == before
