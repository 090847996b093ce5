"""`fused_ffn_grouped`: the loop that serves it on a CPU, and the operator over the emulated CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import emulation_path
from ffn_cases import error

from kernels import dispatch
from kernels.dispatch import use_backend
from kernels.ffn import grouped
from kernels.ffn.grouped import GroupMember, fused_ffn_grouped
from kernels.ffn.ops import fused_ffn_stack
from kernels.language.expression import ExpressionError, parse_expression
from kernels.reference.ffn import ffn

TEXTS = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "linear(relu(mul(linear(x,wb1),x)),wb2)",
    "mul(gelu(linear(x,wb1)),add(tanh(x),linear(swish(x),wb2)))",
)


def member(text, hidden, inner, n, number, dtype=torch.float32, layer_norm=True, **options):
    g = torch.Generator().manual_seed(number)

    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).to(dtype).requires_grad_()

    groups = [
        [leaf(inner, hidden, scale=hidden**-0.5) for _ in range(n)],
        [leaf(inner) for _ in range(n)],
        [leaf(hidden, inner, scale=inner**-0.5) for _ in range(n)],
        [leaf(hidden) for _ in range(n)],
    ]
    norm = [[leaf(hidden) for _ in range(n)] for _ in range(2)] if layer_norm else [(), ()]
    return GroupMember(*groups, text, *norm, **options)


def group(dtype=torch.float32):
    """Three members that differ in everything, and their inputs; the last input has three dimensions."""
    members = [
        member(TEXTS[0], 9, 7, 2, 1, dtype, p_drop=0.3, seed=11),
        member(TEXTS[1], 13, 8, 1, 2, dtype, layer_norm=False),
        member(TEXTS[2], 6, 6, 2, 3, dtype, p_drop=0.1, seed=12, eps=1e-6),
    ]
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 9), (8, 13), (2, 3, 6))
    return [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in shapes], members


def leaves_of(inputs, members):
    return [*inputs, *(t for m in members for t in m.parameters)]


def outputs_and_gradients(function, inputs, members):
    outs = function(inputs, members)
    total = sum((out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum() for out in outs)
    return [*outs, *torch.autograd.grad(total, leaves_of(inputs, members))]


def one_by_one(inputs, members):
    return [
        fused_ffn_stack(
            x, m.w1, m.b1, m.w2, m.b2, m.ln_weight, m.ln_bias, m.program,
            policy=m.policy, p_drop=m.p_drop, seed=m.seed, eps=m.eps,
        )
        for x, m in zip(inputs, members, strict=True)
    ]  # fmt: skip


@pytest.fixture
def emulated(monkeypatch):
    """The CUDA backend, over the emulation, for CPU tensors."""
    from kernels.cuda import library

    known = {k: v for k, v in dispatch._loaded.items() if k != "cuda"}
    monkeypatch.setattr(dispatch, "_loaded", known)
    with library.emulated(emulation_path()), use_backend("cuda", strict=True):
        yield


def test_loop_gives_what_each_stack_gives():
    inputs, members = group()
    found = outputs_and_gradients(fused_ffn_grouped, inputs, members)
    expected = outputs_and_gradients(one_by_one, inputs, members)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_values_against_the_float64_reference():
    inputs, members = group()
    for x, m, out in zip(inputs[1:2], members[1:2], fused_ffn_grouped(inputs, members)[1:2], strict=True):
        weights = [t.detach().double() for t in m.parameters]
        exact = ffn(x.double(), *weights, None, None, parse_expression(m.program), return_ln=False)
        assert error(out.detach().double(), exact.detach()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_launch_gives_what_the_loop_gives(emulated, dtype):
    """To a few roundings of the dtype: sums run in another order."""
    inputs, members = group(dtype)
    with use_backend("reference"):
        expected = outputs_and_gradients(fused_ffn_grouped, inputs, members)
    found = outputs_and_gradients(fused_ffn_grouped, inputs, members)
    limit = {torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]
    for own, other in zip(found, expected, strict=True):
        assert own.shape == other.shape
        assert own.dtype == dtype
        assert error(own.detach().double(), other.detach().double()) < limit


def test_one_launch_under_autocast(emulated):
    inputs, members = group()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(fused_ffn_grouped, inputs, members)
        with use_backend("reference"):
            expected = outputs_and_gradients(fused_ffn_grouped, inputs, members)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == torch.float32
        assert error(own.detach().double(), other.detach().double()) < 4e-2


def test_nothing_is_saved_without_gradients(emulated):
    inputs, members = group()
    with torch.no_grad():
        outs = fused_ffn_grouped(inputs, members)
    assert all(out.grad_fn is None for out in outs)
    with_graph = fused_ffn_grouped(inputs, members)
    assert all(torch.equal(a, b) for a, b in zip(outs, with_graph, strict=True))


def test_frozen_parameters_get_no_gradient(emulated):
    inputs, members = group()
    for t in members[0].parameters:
        t.requires_grad_(False)
    sum(out.sum() for out in fused_ffn_grouped(inputs, members)).backward()
    assert all(t.grad is None for t in members[0].parameters)
    assert all(t.grad is not None for t in [*inputs, *members[1].parameters])


def test_operators_pass_opcheck(emulated):
    inputs, members = group()
    rows = [x.detach().reshape(-1, x.shape[-1]).requires_grad_() for x in inputs]
    constants, tensors = grouped._flatten([grouped._call(x, m, None) for x, m in zip(rows, members, strict=True)])
    arguments = (*tensors, *constants)
    torch.library.opcheck(grouped.grouped_fwd, (*arguments, True, None))
    detached = [[t.detach() for t in group] for group in tensors]
    outs, saved = grouped.grouped_fwd(*detached, *constants, True, None)
    needs = [True] * (len(rows) + len(tensors.parameters))
    torch.library.opcheck(grouped.grouped_bwd, (outs, *detached, *constants, None, saved, needs))


def test_second_derivatives_are_refused(emulated):
    inputs, members = group()
    out = fused_ffn_grouped(inputs, members)[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_a_group_on_a_device_starts_no_build_by_itself(monkeypatch):
    """The CUDA kernels are nobody's default before a measurement: they are built where asked for by name."""
    inputs, members = group()
    loaded = []
    monkeypatch.setattr(dispatch, "load_backend", lambda name: loaded.append(name) or "not in this test")
    calls = [grouped._call(x, m, None) for x, m in zip(inputs[:2], members, strict=False)]
    assert not grouped._in_one_launch(calls)
    assert not loaded
    assert "cuda" not in dispatch.ORDER["cuda"]


def test_backends_without_a_group_kernel_run_the_loop():
    inputs, members = group()
    with use_backend("reference"):
        assert not grouped._in_one_launch(
            [grouped._call(x, m, None) for x, m in zip(inputs[:2], members, strict=False)]
        )


def test_bad_arguments_are_named():
    inputs, members = group()
    with pytest.raises(ValueError, match="2 inputs and 3 members"):
        fused_ffn_grouped(inputs[:2], members)
    with pytest.raises(ValueError, match=r"w1\[0\] has shape"):
        fused_ffn_grouped([inputs[1]], [members[2]])
    with pytest.raises(ValueError, match="scalar"):
        fused_ffn_grouped([torch.tensor(1.0)], members[:1])
    wide = member(TEXTS[1], 5, 9, 1, 4)  # truncate needs d <= H
    with pytest.raises(ExpressionError, match="d <= H"):
        fused_ffn_grouped([torch.zeros(2, 5)], [wide])
    assert fused_ffn_grouped([], []) == []
