"""Gradients written over saved tensors: the same gradients, and only where nobody reads the saved tensors again."""

import pytest
import torch
from ffn_cases import RELEASED, Case, tensors
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from kernels.backends.cpu import CpuBackend
from kernels.call import FFNCall
from kernels.dispatch import available_backends, load_backend, use_backend
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import parse_expression
from kernels.language.lowering import lower

if available_backends()["cpu"] is not None:
    pytest.skip(f"no C++ backend: {available_backends()['cpu']}", allow_module_level=True)

BACKEND: CpuBackend = load_backend("cpu")
SUM, Y = RELEASED[4], RELEASED[0]
"""Expressions of which LayerNorm's input, and y, is saved."""
PARALLEL = "mul(tanh(linear(x,wb1)),linear(gelu(x),wb2))"


@pytest.fixture(autouse=True)
def cpu():
    with use_backend("cpu", strict=True):
        yield


def inputs(text=SUM, tokens=67, hidden=45, inner=31, dtype=torch.float32):
    if text == PARALLEL:
        inner = hidden
    return [t.to(dtype) for t in tensors(Case(parse_expression(text), "truncate", tokens, hidden, inner), 0)]


def leaves(values):
    return [v.detach().clone().requires_grad_() for v in values]


def kept_pointers(out):
    return {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 31, 32, 67, 300, 515])
@pytest.mark.parametrize("hidden", [1, 32, 45, 64])
@pytest.mark.parametrize("text", [SUM, Y, PARALLEL])
@pytest.mark.parametrize("has_ln", [True, False], ids=["ln", "bare"])
def test_the_same_gradients_bit_for_bit(text, hidden, tokens, dtype, has_ln):
    """By the backend's own interface; groups of rows and the narrow last panel in all sizes."""
    x, *parameters = inputs(text, tokens, hidden, dtype=dtype)
    lowered = lower(parse_expression(text))
    groups = [[p.detach()] for p in parameters] if has_ln else [*([p.detach()] for p in parameters[:4]), [], []]
    call = FFNCall(x.detach(), *groups, lowered.tensor, int(lowered.flags), 0.0, None, 1e-12, dtype)
    _, saved = BACKEND.forward(call, True)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    needs = [True] * (1 + sum(len(g) for g in groups))
    kept = [s.clone() for s in saved]
    expected = BACKEND.backward(call, grad, saved, needs)
    assert all(map(torch.equal, saved, kept)), "saved tensors were written to without leave"
    got = BACKEND.backward(call, grad, saved, needs, overwrite=True)
    assert all(map(torch.equal, got, expected))
    if has_ln:
        assert got[0].data_ptr() in {s.data_ptr() for s in saved}


@pytest.mark.parametrize("text", [SUM, Y])
def test_a_pass_that_frees_its_graph_uses_the_memory(text):
    values = leaves(inputs(text))
    out = fused_ffn(*values, text)
    kept = kept_pointers(out)
    out.sum().backward()
    assert values[0].grad.data_ptr() in kept


@pytest.mark.parametrize("text", [SUM, Y])
def test_a_retained_graph_gives_the_same_gradients_again(text):
    values = leaves(inputs(text))
    out = fused_ffn(*values, text)
    kept = kept_pointers(out)
    passes = [torch.autograd.grad(out.square().sum(), values, retain_graph=keep) for keep in (True, True, False)]
    assert [p[0].data_ptr() in kept for p in passes] == [False, False, True]
    for other in passes[1:]:
        assert all(map(torch.equal, passes[0], other))


def test_a_first_layer_of_several_and_a_stack():
    """The gradient goes on to an earlier operation, and to an input that another operation reads as well."""
    x, *parameters = leaves(inputs())
    with use_backend("reference", strict=True):
        expected = torch.autograd.grad(through(x, parameters).square().sum(), [x, *parameters])
    got = torch.autograd.grad(through(x, parameters).square().sum(), [x, *parameters])
    for a, b in zip(got, expected, strict=True):  # float32, sums of some hundred terms
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def through(x, parameters):
    before = torch.sin(x)
    stacked = fused_ffn_stack(before, *([p, p] for p in parameters), SUM)
    return fused_ffn(stacked + before, *parameters, Y) * before


def test_saved_tensors_of_hooks_are_left_alone():
    values, handed_out = leaves(inputs()), []

    def pack(t):
        handed_out.append((t, t.clone()))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = fused_ffn(*values, SUM)
    out.square().sum().backward()
    assert len(handed_out) > 7
    assert all(torch.equal(t, before) for t, before in handed_out)


def test_checkpointed_layers_agree():
    values = leaves(inputs())
    expected = torch.autograd.grad(fused_ffn(*values, SUM).square().sum(), values)
    out = checkpoint(lambda *v: fused_ffn(*v, SUM), *values, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(out.square().sum(), values), expected))


def test_an_operators_own_results_are_left_alone():
    x, *parameters = leaves(inputs())
    lowered = lower(parse_expression(SUM))
    groups = [[p] for p in parameters]
    out, saved = torch.ops.ffnas.ffn_fwd(x, *groups, lowered.tensor, int(lowered.flags), 0.0, None, 1e-12, True)
    before = [s.clone() for s in saved]
    out.square().sum().backward()
    assert all(map(torch.equal, saved, before))


def test_a_single_rows_stride_does_not_count():
    """Compilers give a dimension of size 1 any stride."""
    x, *parameters = inputs(SUM, tokens=1)
    lowered = lower(parse_expression(SUM))
    call = FFNCall(
        x.detach(), *([p.detach()] for p in parameters), lowered.tensor, int(lowered.flags), 0.0, None, 1e-12, x.dtype
    )
    _, saved = BACKEND.forward(call, True)
    odd = [s.as_strided(s.shape, (1, 1)) for s in saved]
    expected = BACKEND.backward(call, torch.ones_like(x), saved, [True] * 7)
    assert all(map(torch.equal, BACKEND.backward(call, torch.ones_like(x), odd, [True] * 7), expected))
