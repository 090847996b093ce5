"""Kronecker weights: the product, the nearest one, both routes of an FFN against float64, modules, shapes."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from ffn_cases import error, random_case

from kernels.dispatch import available_backends, use_backend
from kernels.ffn import kron
from kernels.ffn.grouped import GroupMember, fused_ffn_grouped
from kernels.ffn.kron import KronWeight, kron_linear, nearest_kron
from kernels.ffn.modules import FusedFFN, FusedFFNStack, KronLinear
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import ExpressionError, kron_weights, parse_expression, parse_layer, with_kron
from kernels.language.kron_shape import default_block, factor_shapes, weight_products, weight_size
from kernels.language.lowering import lower
from kernels.language.widths import validate
from kernels.reference.ffn import ffn
from kernels.reference.philox import dropout_mask

TEXT = "tanh(add(kron(relu(mul(kron(x,wb1),x)),wb2),x))"
H, D, BLOCK = 24, 18, (6, 4)


def factors(weight="wb1", hidden=H, inner=D, block=BLOCK, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    scale = (hidden if weight == "wb1" else inner) ** -0.25
    return KronWeight(*(
        (torch.randn(s, generator=g, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for s in factor_shapes(weight, block, hidden, inner)
    ))  # fmt: skip


def test_text_round_trip():
    for text in (TEXT, "linear(gelu(kron(x,wb1)),wb2)"):
        assert str(parse_expression(text)) == text
    layer = parse_layer("kron3_4(gelu(linear3_4(x,wb1)),wb2)")
    assert (layer.stack, layer.ratio.denominator) == (3, 4)
    assert layer.expression.text(3, layer.ratio) == "kron3_4(gelu(linear3_4(x,wb1)),wb2)"
    assert kron_weights(layer.expression) == {"wb2"}
    assert str(with_kron(layer.expression, ("wb1",))) == "linear(gelu(kron(x,wb1)),wb2)"
    assert lower(layer.expression) == lower("linear(gelu(linear(x,wb1)),wb2)")


@pytest.mark.parametrize("text", ["kron(x)", "kron(x,wb3)", "kron1_2(gelu(linear1_3(x,wb1)),wb2)", "kron(x,x)"])
def test_wrong_texts(text):
    with pytest.raises(ExpressionError):
        parse_expression(text)


def test_widths_are_those_of_a_linear():
    validate(parse_expression(TEXT), H, D)
    with pytest.raises(ExpressionError, match="wb2 takes an operand 18 wide"):
        validate(parse_expression("kron(mul(x,tanh(x)),wb2)".replace("x,", "kron(x,wb1),", 1)), 12, D)


@pytest.mark.parametrize(("hidden", "inners", "block"), [
    (540, [540, 270, 180, 135], (15, 20)),
    (768, [3072], (48, 24)),
    (97, [97], (1, 1)),  # 97 is prime, and 1 nearer to its root than 97
    (96, [96, 48, 32, 24], (8, 8)),
])  # fmt: skip
def test_the_rule_of_shapes(hidden, inners, block):
    p, q = default_block(hidden, inners)
    assert (p, q) == block
    for inner in inners:
        (a1, a2), (b1, b2) = factor_shapes("wb2", (p, q), hidden, inner)
        assert (a1 * b1, a2 * b2) == (hidden, inner)
    divisors = [k for k in range(1, hidden + 1) if hidden % k == 0]
    assert all(abs(q - math.sqrt(hidden)) <= abs(k - math.sqrt(hidden)) for k in divisors)


def test_counts_are_those_of_the_tensors():
    weight = factors("wb2")
    assert weight_size("wb2", {"wb2"}, BLOCK, H, D) == weight.a.numel() + weight.b.numel()
    assert weight_size("wb1", {"wb2"}, BLOCK, H, D) == H * D
    (a1, a2), (b1, b2) = weight.a.shape, weight.b.shape
    assert weight_products("wb2", {"wb2"}, BLOCK, H, D) == min(a2 * b1 * b2 + a1 * a2 * b1, a1 * a2 * b2 + a1 * b1 * b2)


@pytest.mark.parametrize("name", ["wb1", "wb2"])
@pytest.mark.parametrize("block", [BLOCK, (1, 1), (18, 24), (9, 2)], ids=str)
def test_product_and_linear(name, block):
    weight = factors(name, block=block)
    whole = torch.kron(weight.a, weight.b)
    assert torch.equal(weight.whole(), whole)
    assert weight.shape == whole.shape
    g = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((7, whole.shape[1]), whole.shape[:1]))
    torch.testing.assert_close(kron_linear(x, weight, bias), torch.nn.functional.linear(x, whole, bias))


@pytest.mark.parametrize(
    ("shape", "small"), [((18, 24), (6, 4)), ((24, 18), (4, 6)), ((7, 5), (1, 5)), ((5, 1), (5, 1))]
)
def test_nearest_product(shape, small):
    """The best of all products: a product is found again, and the error is that of the rank-1 truncation."""
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    found = nearest_kron(weight, small)
    (a1, a2), (b1, b2) = found.a.shape, small
    rearranged = torch.stack([
        weight[i * b1 : (i + 1) * b1, j * b2 : (j + 1) * b2].flatten() for i in range(a1) for j in range(a2)
    ])  # fmt: skip
    values = torch.linalg.svdvals(rearranged)
    torch.testing.assert_close((weight - found.whole()).norm(), values[1:].square().sum().sqrt())
    torch.testing.assert_close(found.a.norm(), found.b.norm())
    again = nearest_kron(found.whole(), small)
    torch.testing.assert_close(again.a, found.a)
    torch.testing.assert_close(again.b, found.b)
    zero = nearest_kron(torch.zeros(shape), small)
    assert not zero.whole().any()
    with pytest.raises(ValueError, match="does not divide"):
        nearest_kron(weight, (small[0] + shape[0], small[1]))


def leaves(inputs):
    return [t for item in inputs for t in (item if isinstance(item, KronWeight) else [item])]


def inputs_for(tokens, dtype, seed=3, hidden=H, inner=D, block=BLOCK):
    g = torch.Generator().manual_seed(seed)

    def make(*shape, scale=1.0, add=0.0):
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale + add).to(dtype).requires_grad_()

    w1, w2 = (factors(w, hidden, inner, block, dtype, seed + k) for k, w in enumerate(("wb1", "wb2")))
    return [
        make(tokens, hidden), w1, make(inner, scale=0.5), w2, make(hidden, scale=0.5),
        make(hidden, scale=0.3, add=1.0), make(hidden, scale=0.3),
    ]  # fmt: skip


def doubled(inputs):
    return [
        KronWeight(*(t.detach().double().requires_grad_() for t in i)) if isinstance(i, KronWeight)
        else i.detach().double().requires_grad_() for i in inputs
    ]  # fmt: skip


def gradients(out, inputs, weight):
    return [out, *torch.autograd.grad(out, leaves(inputs), weight.to(out.dtype))]


@pytest.mark.parametrize("factored", [True, False], ids=["factored", "whole"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_both_routes_against_float64(factored, dtype, tokens, monkeypatch):
    """Values and gradients of all factors: 16 roundings of the dtype, as two products of either route have."""
    monkeypatch.setattr(kron, "FEW_TOKENS", 10**6 if factored else -1)
    inputs = inputs_for(tokens, dtype)
    text, weight = "tanh(add(kron(swish(mul(kron(x,wb1),x)),wb2),x))", torch.randn(tokens, H)
    own = gradients(fused_ffn(*inputs, text, p_drop=0.25, seed=5), inputs, weight)
    x, w1, b1, w2, b2, *norms = wide = doubled(inputs)
    exact = ffn(x, w1.whole(), b1, w2.whole(), b2, *norms, parse_expression(text), p_drop=0.25, seed=5)
    unit = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}[dtype]
    for a, b in zip(own, gradients(exact, wide, weight), strict=True):
        assert a.dtype == dtype
        assert error(a.double(), b) <= 16 * unit


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_forced_backend_runs_the_whole_weight(backend):
    reason = available_backends()[backend]
    if reason is not None:
        pytest.skip(reason)
    inputs = inputs_for(33, torch.float32)
    weight = torch.randn(33, H)
    with use_backend(backend, strict=True):
        own = gradients(fused_ffn(*inputs, TEXT), inputs, weight)
        x, w1, b1, w2, b2, *norms = inputs
        full = fused_ffn(x, w1.whole(), b1, w2.whole(), b2, *norms, TEXT)
    assert torch.equal(own[0], full)
    for a, b in zip(own, gradients(full, inputs, weight), strict=True):
        assert torch.equal(a, b)


def test_random_expressions_by_the_factored_route(monkeypatch):
    """Serial and parallel forms, both policies, one or both weights factored, stacks of two, without LayerNorm."""
    monkeypatch.setattr(kron, "FEW_TOKENS", 10**6)
    rng = Random(4)
    for seed in range(30):
        case = random_case(rng, (6, 12, 15), (3, 9))
        block = default_block(case.hidden, [case.inner])
        inputs = inputs_for(case.tokens, torch.float64, seed, case.hidden, case.inner, block)
        if seed % 3 == 0:
            inputs[1] = inputs[1].whole().detach().requires_grad_()
        stack = [[t, t] for t in (inputs[1:] if seed % 2 else inputs[1:5])] + ([] if seed % 2 else [[], []])
        out = fused_ffn_stack(inputs[0], *stack, case.expression, policy=case.policy)
        x, w1, b1, w2, b2 = inputs[:5]
        norms = inputs[5:] if seed % 2 else (None, None)
        z = x
        for _ in range(2):
            args = (z, kron.whole(w1), b1, kron.whole(w2), b2, *norms, case.expression)
            z = ffn(*args, policy=case.policy, return_ln=bool(seed % 2))
        torch.testing.assert_close(out, z, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_dropout_of_the_factored_route(monkeypatch):
    monkeypatch.setattr(kron, "FEW_TOKENS", 10**6)
    x, w1, b1, w2, b2, *_ = inputs_for(40, torch.float32)
    ones, zeros, bare = torch.ones(H), torch.zeros(H), "kron(gelu(kron(x,wb1)),wb2)"
    seeded = fused_ffn(x, w1, b1, w2, b2, ones, zeros, bare, p_drop=0.5, seed=11)
    value = fused_ffn(x, w1, b1, w2, b2, None, None, bare, return_ln=False)
    mask = dropout_mask((40, H), 0.5, 11)
    expected = torch.nn.functional.layer_norm(x + torch.where(mask, value * 2, 0), (H,), eps=1e-12)
    torch.testing.assert_close(seeded, expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    first = fused_ffn(x, w1, b1, w2, b2, ones, zeros, bare, p_drop=0.5)
    torch.manual_seed(0)
    assert torch.equal(first, fused_ffn(x, w1, b1, w2, b2, ones, zeros, bare, p_drop=0.5))
    assert not torch.equal(first, fused_ffn(x, w1, b1, w2, b2, ones, zeros, bare, p_drop=0.5))


def test_route_goes_by_what_the_factors_save():
    def route(hidden, inner, tokens, only=None):
        block = default_block(hidden, [inner])
        w1, w2 = (KronWeight(*(torch.empty(s) for s in factor_shapes(w, block, hidden, inner))) for w in ("wb1", "wb2"))
        return kron.is_factored(torch.empty(tokens, hidden), [w1], [w2.whole() if only else w2])

    assert route(96, 96, 64)
    assert not route(96, 96, 65)
    assert not route(540, 135, 4096)
    assert route(540, 540, 4096)
    assert route(768, 3072, 4096)
    assert not route(540, 540, 4096, only="wb1")


def test_autocast_rounds_products_only():
    inputs = inputs_for(33, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_ffn(*inputs, TEXT)
    assert out.dtype == torch.float32
    x, w1, b1, w2, b2, *norms = doubled(inputs)
    exact = ffn(x, w1.whole(), b1, w2.whole(), b2, *norms, parse_expression(TEXT))
    assert 2.0**-24 * 64 < error(out.double(), exact) < 16 * 2.0**-9


def test_grouped_members():
    inputs = inputs_for(33, torch.float32)
    x, w1, b1, w2, b2, *norms = inputs
    plain = GroupMember([w1.whole()], [b1], [w2], [b2], TEXT, [norms[0]], [norms[1]])
    factored = GroupMember([w1], [b1], [w2], [b2], TEXT, [norms[0]], [norms[1]])
    for out in fused_ffn_grouped([x, x], [plain, factored]):
        torch.testing.assert_close(out, fused_ffn(*inputs, TEXT), rtol=1e-4, atol=1e-5)


def test_modules_train_their_factors():
    torch.manual_seed(0)
    module = FusedFFN(H, D, TEXT, kron_block=BLOCK)
    names = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert names["dense1.a"] == (3, 6)
    assert names["dense1.b"] == (6, 4)
    assert names["dense2.a"] == (6, 3)
    assert sum(p.numel() for p in module.parameters()) == sum(
        weight_size(w, {"wb1", "wb2"}, BLOCK, H, D) for w in ("wb1", "wb2")
    ) + D + 3 * H  # fmt: skip
    module(torch.randn(2, 5, H)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    stack = FusedFFNStack(2, H, D, TEXT, kron_block=BLOCK)
    assert stack(torch.randn(5, H)).shape == (5, H)
    linear = KronLinear(((30, 20), (30, 20)))
    assert float(linear.weight.whole().detach().std()) == pytest.approx((3 * 400) ** -0.5, rel=0.1)
    weight = torch.kron(torch.eye(30, 20), torch.randn(30, 20))
    with torch.no_grad():
        for own, found in zip((linear.a, linear.b), nearest_kron(weight, (30, 20)), strict=True):
            own.copy_(found)
    torch.testing.assert_close(linear(torch.eye(400)[:3]), weight.T[:3], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="7 does not divide the inner width 18"):
        FusedFFN(H, D, TEXT, kron_block=(7, 4))


def test_wrong_shapes_are_named():
    x, w1, b1, w2, b2, *norms = inputs_for(3, torch.float32)
    with pytest.raises(ValueError, match="b1"):
        fused_ffn(x, w1, b2, w2, b2, *norms, TEXT)
    with pytest.raises(ValueError, match="w2"):
        fused_ffn(x, w1, b1, w1, b2, *norms, TEXT)
