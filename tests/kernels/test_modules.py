"""FusedFFN and FusedFFNStack against hand-written modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels.dispatch import use_backend
from kernels.ffn.modules import FusedFFN, FusedFFNStack
from kernels.language.expression import ExpressionError

# float32 rounding of two products of width <= 64 and a LayerNorm, in another order of summation
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class PlainFFN(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(hidden, inner)
        self.dense2 = nn.Linear(inner, hidden)
        self.layernorm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, x):
        return self.layernorm(x + self.dense2(F.gelu(self.dense1(x), approximate="tanh")))


def test_state_dict_and_values_are_those_of_plain_modules():
    plain = PlainFFN(45, 27)
    fused = FusedFFN(45, 27)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 7, 45, requires_grad=True)
    out, expected = fused(x), plain(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    weight = torch.randn_like(out)
    own = torch.autograd.grad(out, [x, *fused.parameters()], weight)
    other = torch.autograd.grad(expected, [x, *plain.parameters()], weight)
    for a, b in zip(own, other, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_a_stack_equals_its_layers_one_by_one():
    stack = FusedFFNStack(3, 20, 10, "linear(relu(mul(linear(x,wb1),x)),wb2)")
    x = torch.randn(9, 20)
    expected = x
    for layer in stack.layers:
        expected = layer(expected)
    torch.testing.assert_close(stack(x), expected, **CLOSE)


def test_dropout_is_on_in_training_only_and_follows_the_seed():
    module = FusedFFNStack(2, 30, 12, p_drop=0.4)
    x = torch.randn(50, 30)
    assert torch.equal(module(x, seed=3), module(x, seed=3))
    assert not torch.equal(module(x, seed=3), module(x, seed=4))
    torch.manual_seed(0)
    first = module(x)
    second = module(x)
    torch.manual_seed(0)
    assert torch.equal(first, module(x))
    assert not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x), module(x, seed=5))


def test_bare_expression():
    module = FusedFFN(8, 8, "mul(linear(x,wb1),linear(x,wb2))", layer_norm=False)
    x = torch.randn(3, 8)
    assert list(module.state_dict()) == ["dense1.weight", "dense1.bias", "dense2.weight", "dense2.bias"]
    torch.testing.assert_close(module(x), module.dense1(x) * module.dense2(x), **CLOSE)


@pytest.mark.parametrize("build", [lambda: FusedFFN(9, 5), lambda: FusedFFNStack(2, 9, 5)], ids=["one", "stack"])
def test_copies_and_dtypes(build):
    module = build()
    twin = copy.deepcopy(module)
    x = torch.randn(4, 9)
    assert torch.equal(module(x), twin(x))
    with use_backend("reference"):
        assert module.double()(x.double()).dtype == torch.float64
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_functional_call_sees_replaced_parameters():
    module = FusedFFN(6, 4)
    x = torch.randn(3, 6)
    zeros = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    assert torch.equal(torch.func.functional_call(module, zeros, (x,)), torch.zeros(3, 6))


def test_a_training_step_lowers_the_loss():
    torch.manual_seed(0)
    module, x = FusedFFNStack(2, 16, 8), torch.randn(32, 16)
    target = torch.randn(32, 16)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_wrong_arguments_are_refused():
    with pytest.raises(ExpressionError, match="needs d <= H"):
        FusedFFN(8, 9, "linear(relu(mul(linear(x,wb1),x)),wb2)")
    with pytest.raises(ExpressionError, match="unknown operator"):
        FusedFFN(8, 8, "linear(gleu(linear(x,wb1)),wb2)")
    with pytest.raises(ValueError, match="p_drop"):
        FusedFFN(8, 8, p_drop=1.5)
    with pytest.raises(ValueError, match="without LayerNorm"):
        FusedFFN(8, 8, p_drop=0.1, layer_norm=False)
    with pytest.raises(ValueError, match="stack"):
        FusedFFNStack(0, 8, 8)
