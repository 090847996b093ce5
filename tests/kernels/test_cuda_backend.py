"""The CUDA backend's two routes behind the op, over the emulated kernels; on a GPU the same against the reference."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from cuda_cases import DTYPE_IDS, DTYPES, complaints, stack
from cuda_emulation import emulation_path

from kernels import dispatch
from kernels.backends import cuda
from kernels.call import BackendUnavailable
from kernels.cuda import library
from kernels.dispatch import use_backend
from kernels.ffn.ops import fused_ffn_stack
from kernels.language.expression import parse_expression

TEXTS = ("tanh(linear(gelu(linear(x,wb1)),wb2))", "mul(gelu(linear(x,wb1)),add(tanh(x),linear(swish(x),wb2)))")


def run(s):
    """(out, *gradients) through the public op."""
    inputs = [t.detach().requires_grad_() for t in s.inputs]
    x, *rest = inputs
    n = s.call.layers
    groups = [rest[k : k + n] for k in range(0, len(rest), n)] + [[], []]
    options = {"policy": s.policy, "p_drop": s.call.p_drop, "seed": s.call.seed, "eps": s.call.eps}
    out = fused_ffn_stack(x, *groups[:6], parse_expression(s.text), **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, s.grad_out, materialize_grads=True, allow_unused=True)]


@pytest.fixture
def stack_route(monkeypatch):
    monkeypatch.setenv(cuda.ENVIRONMENT, "stack")
    monkeypatch.setattr(dispatch, "_loaded", {k: v for k, v in dispatch._loaded.items() if k != "cuda"})
    with library.emulated(emulation_path()), use_backend("cuda", strict=True):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("text", TEXTS, ids=["serial", "parallel"])
def test_stack_route_behind_the_op(stack_route, text, dtype):
    s = stack(text, 9, 33, 33, 2, dtype=dtype, p_drop=0.2)
    assert not complaints(s, run(s))
    assert dispatch.load_backend("cuda")._route(s.call) == "stack"


def test_the_route_is_read_at_every_call(stack_route, monkeypatch):
    backend, call = dispatch.load_backend("cuda"), stack(TEXTS[0], 9, 17, 17).call
    layouts = {}
    for route in cuda.ROUTES:
        monkeypatch.setenv(cuda.ENVIRONMENT, route)
        monkeypatch.setattr(backend, "_route_reason", lambda route, call: None)
        layouts[route] = backend.saved_layout
        assert backend._route(call) == route
    assert layouts["rows"] != layouts["stack"]


def test_saved_tensors_are_those_announced(stack_route):
    s = stack(TEXTS[0], 9, 33, 17, 3)
    backend = dispatch.load_backend("cuda")
    _, saved = backend.forward(s.call, True)
    like = backend.saved_like(s.call)
    assert [(t.shape, t.dtype, t.stride()) for t in saved] == [(t.shape, t.dtype, t.stride()) for t in like]


ROWS_ROUTE = """
import sys
sys.path.insert(0, {tests!r})
from cuda_cases import complaints, stack
from cuda_emulation import emulation_path
from kernels import dispatch
from kernels.cuda import library
from kernels.dispatch import use_backend
from test_cuda_backend import TEXTS, run
with library.emulated(emulation_path()), use_backend("cuda", strict=True):
    for k, text in enumerate(TEXTS):
        s = stack(text, 9, 17, 17, 1 + k, p_drop=0.2, seed=k)
        found = complaints(s, run(s))
        assert not found, found
        assert dispatch.load_backend("cuda")._route(s.call) == "rows"
"""


def test_rows_route_with_triton_products():
    """Triton's interpreter makes the products, the emulated CUDA kernels the rows."""
    pytest.importorskip("triton")
    code = ROWS_ROUTE.format(tests=os.path.dirname(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "1", cuda.ENVIRONMENT: "rows"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_reasons_are_named(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            cuda.load()
    backend = cuda.CudaBackend()
    assert "CUDA tensors" in backend.supports(stack(TEXTS[0], 1, 4, 4).call)
    with library.emulated(emulation_path()):
        monkeypatch.setenv(cuda.ENVIRONMENT, "both")
        with pytest.raises(BackendUnavailable, match="none of rows, stack"):
            cuda.load()
        reason = backend.supports(stack(TEXTS[0], 1, 4, 4, dtype=torch.float64).call)
        assert "stack: " in reason
        assert "float64" in reason


def on_device(s, device="cuda"):
    """The same call on a device; masks and programs stay what they are."""
    move = lambda group: [t.to(device) for t in group]  # noqa: E731
    call = s.call
    for name in ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias"):
        setattr(call, name, move(getattr(call, name)))
    call.x = call.x.to(device)
    call.seed = None if call.seed is None else call.seed.to(device)
    s.grad_out = s.grad_out.to(device)
    return s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("route", cuda.ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("text", TEXTS, ids=["serial", "parallel"])
def test_on_a_gpu(monkeypatch, text, dtype, route):
    monkeypatch.setenv(cuda.ENVIRONMENT, route)
    monkeypatch.setattr(dispatch, "_loaded", {k: v for k, v in dispatch._loaded.items() if k != "cuda"})
    for hidden, inner, n in ((540, 540, 2), (541, 541, 1), (45, 45, 3)):
        s = stack(text, 200, hidden, inner, n, dtype=dtype, p_drop=0.1, seed=hidden)
        expected = stack(text, 200, hidden, inner, n, dtype=dtype, p_drop=0.1, seed=hidden)
        with use_backend("cuda", strict=True):
            own = [t.cpu() for t in run(on_device(s))]
        assert not complaints(expected, own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_captured_graph_replays_on_a_gpu(monkeypatch):
    monkeypatch.setenv(cuda.ENVIRONMENT, "stack")
    monkeypatch.setattr(dispatch, "_loaded", {k: v for k, v in dispatch._loaded.items() if k != "cuda"})
    s = on_device(stack(TEXTS[0], 200, 540, 270, 2, dtype=torch.bfloat16, p_drop=0.1))
    with use_backend("cuda", strict=True):
        eager = run(s)  # the program's device copy, and the kernels: a capture must load nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(s)
        graph.replay()
        first = [t.clone() for t in captured]
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, first, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(eager, first, strict=True))  # the same kernels
    expected = stack(TEXTS[0], 200, 540, 270, 2, dtype=torch.bfloat16, p_drop=0.1)
    assert not complaints(expected, [t.cpu() for t in first])
