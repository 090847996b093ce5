"""What a captured CUDA graph relies on. Without a device `torch.cuda.is_current_stream_capturing` is a switch."""

from __future__ import annotations

import threading

import pytest
import torch
from cuda_cases import stack
from cuda_emulation import emulation_path

from kernels import fused_ffn, lower, upload, use_backend
from kernels.backends.cuda import ENVIRONMENT, CudaBackend
from kernels.call import FFNCall
from kernels.cuda import grouped, library, rows
from kernels.cuda.programs import device_program

pytest.importorskip("triton")

from kernels.triton import ffn, gemm, launch
from kernels.triton.device_program import ProgramBuffer
from kernels.triton.evaluate import interpret
from kernels.triton.launch import interpreted, recorded, target
from kernels.triton.specialize import program_of

CUDA = torch.device("cuda", 0)
TEXT = "tanh(linear(gelu(linear(x,wb1)),wb2))"
compiles = pytest.mark.skipif(interpreted(interpret), reason="the interpreter compiles nothing")


@pytest.fixture
def capture(monkeypatch):
    """A switch: whether the current stream is being captured."""
    state = {"on": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["on"])
    return lambda on: state.update(on=on)


def test_copies_a_graph_was_captured_with_are_kept(capture, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    copies = upload.Copies(4)
    first = copies.get(CUDA, "captured", object)
    capture(True)
    assert copies.get(CUDA, "captured", object) is first
    capture(False)
    early = copies.get(CUDA, 0, object)
    for key in range(1, 4):
        copies.get(CUDA, key, object)
    assert not waited
    assert len(copies) == 5
    copies.get(CUDA, 0, object)  # used again: younger than 1 and 2
    copies.get(CUDA, 4, object)
    assert waited == [CUDA]  # kernels may still read what is dropped
    assert copies.get(CUDA, 0, object) is early
    assert copies.get(CUDA, "captured", object) is first
    assert len(copies) == 4


def test_copies_are_made_outside_the_calling_threads_memory_pool(capture, monkeypatch):
    """A pool that is open in this thread, as while Inductor warms up a graph, must not get a copy that outlives it."""
    threads = []
    monkeypatch.setattr(upload, "_copied", lambda host, device: threads.append(threading.current_thread()) or host)
    host = torch.zeros(3, dtype=torch.int32)
    assert upload.upload(host, CUDA) is host
    assert threads != [threading.current_thread()]
    capture(True)
    with pytest.raises(RuntimeError, match="first used while a CUDA graph was captured"):
        upload.upload(host, CUDA)
    assert len(threads) == 1


def call(tokens=64, hidden=540, inner=135, text=TEXT, device="meta"):
    program = lower(text)
    shapes = ((tokens, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,))
    x, *rest = (torch.empty(s, dtype=torch.bfloat16, device=device) for s in shapes)
    return FFNCall(x, *([t] for t in rest), program.tensor, int(program.flags), 0.0, None, 1e-12, x.dtype)


def launches(c):
    """What forward and backward launch."""
    needs = [True] * 7

    def both():
        ffn.forward(c, True, program_of(c, True))
        ffn.backward(c, c.x, ffn.saved_like(c), needs, program_of(c, True, needs))

    return recorded(both)


@compiles
def test_a_capture_launches_the_kernels_that_were_warmed(capture, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_capability", lambda _: 90)
    for text in (TEXT, "add(gelu(linear(x,wb1)),linear(tanh(x),wb2))"):
        for buffered in (False, True):
            c = call(inner=540, text=text)
            if buffered:
                buffer = ProgramBuffer(lower(text), "meta")
                c.program = buffer.bound.tensor
            warmed = [k.key() for k in launches(c)]
            capture(True)
            assert [k.key() for k in launches(c)] == warmed
            capture(False)


def test_cuda_kernels_have_the_same_blocks_in_a_capture(capture, monkeypatch):
    """Captured and plain calls run, and benchmarks time, one kernel."""
    with library.emulated(emulation_path()):
        s = stack(TEXT, 40, 33, 17, 2)
        _, temporaries = device_program(s.call.program, s.call.x.device)

        def plans():
            record = grouped._Record([s.call], backward=True)
            return rows._plan(s.call, 40, temporaries, backward=True), record.slots, record.rows

        plain = plans()
        capture(True)
        assert plans() == plain


@compiles
def test_a_kernel_first_used_in_a_capture_is_named(capture):
    """Instead of an error of the driver's that names nothing."""
    parts, out = torch.empty(8, 8, device="meta"), torch.empty(8, device="meta")
    capture(True)
    with (
        target(90),
        pytest.raises(RuntimeError, match="kernel ffn_reduce_kernel was first used while a CUDA graph was captured"),
    ):
        launch.launch(gemm.ffn_reduce_kernel, (1,), parts, out, 8, 8, 8, BP=4, BN=2, warps=1, stages=1)


def test_no_grid_ends_before_the_tokens_do():
    """A grid's second and third axis end at 65,535 programs: 2.1 million tokens in blocks of 32."""
    for text in (TEXT, "mul(gelu(linear(x,wb1)),linear(tanh(x),wb2))"):
        for slots in (0, 16):
            c = call(tokens=8_000_000, inner=540, text=text)
            buffer = ProgramBuffer(lower(text), "meta", slots=slots) if slots else None
            if buffer is not None:
                c.program = buffer.bound.tensor
            found = launches(c)
            assert (16 in [one.constants.get("SLOTS") for one in found]) == bool(slots)
            for one in found:
                assert one.grid[0] < 2**31, one.kernel
                assert all(size <= 65535 for size in one.grid[1:]), (one.kernel, one.grid)


def buffered_call(bound):
    """(the call, a buffer that holds another program by now)."""
    s = stack(TEXT, 5, 16, 8)
    buffer = ProgramBuffer(lower(TEXT), "cpu")
    if bound:
        s.call.program = buffer.bound.tensor
    return s, buffer


@pytest.mark.parametrize("bound", [False, True], ids=["active", "bound"])
def test_kernels_that_do_not_read_a_buffer_refuse_it(bound, monkeypatch):
    """They would compute the buffer's first program, and a captured graph would replay it for ever."""
    monkeypatch.setenv(ENVIRONMENT, "stack")
    with library.emulated(emulation_path()):
        backend = CudaBackend()
        s, buffer = buffered_call(bound)
        with buffer:
            with pytest.raises(RuntimeError, match=r"ProgramBuffer.*FFNAS_BACKEND=triton or FFNAS_CUDA_ROUTE=rows"):
                backend.forward(s.call, True)
            with pytest.raises(RuntimeError, match="ProgramBuffer"):
                backend.backward(s.call, s.grad_out, grouped.saved_like(s.call), [True] * len(s.inputs))
            assert "ProgramBuffer" in backend.supports_group([s.call])
        plain = stack(TEXT, 5, 16, 8)
        assert backend.supports_group([plain.call]) is None
        out, _ = backend.forward(plain.call, True)
        assert out.shape == (5, 16)


@pytest.mark.parametrize("bound", [False, True], ids=["active", "bound"])
def test_route_rows_gives_a_buffers_calls_to_tritons_row_kernels(bound):
    from kernels.backends import cuda
    from kernels.triton.rows import TritonRows

    s, buffer = buffered_call(bound)
    with buffer:
        for backward in (False, True):
            assert isinstance(cuda._implementation(s.call, backward=backward), TritonRows)
    if not bound:
        assert cuda._implementation(s.call, backward=False) is rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("given", ["text", "program"])
def test_inductors_graphs_take_a_program_that_lives_on_the_cpu(given):
    """Its device copy is made while Inductor warms up a graph, in a memory pool of that graph's own."""
    text = "elu(linear(tanh(linear(max(x,tanh(x)),wb1)),wb2))"  # nobody else's: first used here
    program = lower(text) if given == "program" else text
    generator = torch.Generator().manual_seed(0)
    shapes = ((64, 96), (48, 96), (48,), (96, 48), (96,), (96,), (96,))
    x, *rest = (torch.randn(s, generator=generator).cuda() for s in shapes)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: fused_ffn(*t, program), mode="reduce-overhead", fullgraph=True)
    with use_backend("triton", strict=True), torch.no_grad():
        for k in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x + k, *rest).clone(), fused_ffn(x + k, *rest, text)), k
