"""Plain eager calls go past the dispatcher; whoever watches it must still see the op."""

from __future__ import annotations

import io
from typing import ClassVar

import pytest
import torch
from ffn_cases import Case, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.dispatch import available_backends, use_backend
from kernels.ffn import autograd as library_autograd
from kernels.ffn.modules import FusedFFNStack
from kernels.ffn.ops import fused_ffn
from kernels.language.expression import parse_expression

EXPRESSION = parse_expression("tanh(linear(gelu(linear(x,wb1)),wb2))")
CASE = Case(EXPRESSION, "truncate", 5, 9, 7)


class Names(TorchDispatchMode):
    """Collects the names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class Wrapped(torch.Tensor):
    """A subclass that counts the operators it meets."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def step(inputs):
    """Forward and backward."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    fused_ffn(*leaves, EXPRESSION).sum().backward()
    return [t.grad for t in leaves]


@pytest.fixture
def inputs():
    return [t.detach() for t in tensors(CASE, 0, torch.float32)]


@pytest.fixture
def through_dispatcher(monkeypatch):
    """Names of the operators called through the dispatcher."""
    called = []
    for name in ("ffn_fwd", "ffn_bwd"):
        op = getattr(library_autograd, name)
        monkeypatch.setattr(library_autograd, name, lambda *args, op=op, name=name: called.append(name) or op(*args))
    return called


def test_plain_calls_do_not_pass_the_dispatcher(inputs, through_dispatcher):
    with torch.no_grad():
        fused_ffn(*inputs, EXPRESSION)
    step([torch.nn.Parameter(t) for t in inputs])
    assert through_dispatcher == []


def test_results_are_those_of_the_operator(inputs):
    direct = step(inputs)
    with Names():
        dispatched = step(inputs)
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_results_under_autocast_are_those_of_the_operator(inputs, backend):
    if available_backends()[backend] is not None:
        pytest.skip(available_backends()[backend])
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        direct = step(inputs)
        with Names():
            dispatched = step(inputs)
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)


def test_a_dispatch_mode_sees_both_operators(inputs):
    with Names() as names:
        step(inputs)
    assert {"ffnas::ffn_fwd", "ffnas::ffn_bwd"} <= set(names.seen)


def test_the_profiler_sees_both_operators(inputs):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(inputs)
    assert {"ffnas::ffn_fwd", "ffnas::ffn_bwd"} <= {event.key for event in profile.key_averages()}


def test_a_subclass_sees_the_operator(inputs):
    Wrapped.seen.clear()
    with torch.no_grad():
        fused_ffn(inputs[0].as_subclass(Wrapped), *inputs[1:], EXPRESSION)
    assert any("ffn_fwd" in name for name in Wrapped.seen)


def test_a_trace_records_the_operator(inputs):
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: fused_ffn(x, *inputs[1:], EXPRESSION), inputs[0], check_trace=False)
    assert "ffnas::ffn_fwd" in str(traced.graph)


@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_module_is_saved_loaded_and_trained(grad):
    """Traced with gradients on or off (and checked by `torch.jit.trace` itself), run either way."""
    torch.manual_seed(0)
    module, x = FusedFFNStack(2, 20, 12), torch.randn(5, 20)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, (x,))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    other = torch.randn(9, 20, requires_grad=True)
    own, theirs = (torch.autograd.grad(m(other).square().sum(), [other, *m.parameters()]) for m in (loaded, module))
    for a, b in zip(own, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(loaded(other), module(other))
