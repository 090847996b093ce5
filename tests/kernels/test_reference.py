"""The reference against a second evaluator written from the definitions in plain Python, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels.language.expression import Expression, ExpressionError, parse_expression
from kernels.reference.ffn import evaluate, ffn
from kernels.reference.philox import dropout_mask

SCALAR = {
    "gelu": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "gelu_erf": lambda a: 0.5 * a * (1 + math.erf(a / math.sqrt(2))),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "relu": lambda a: a if a > 0 else 0.0,
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    "elu": lambda a: a if a > 0 else math.expm1(a),
    "swish": lambda a: a / (1 + math.exp(-a)),
    "relu2": lambda a: a * a if a > 0 else 0.0,
    "softplus": lambda a: math.log1p(math.exp(a)),
    "identity": lambda a: a,
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": max,
}
IDENTITY = {"add": 0.0, "mul": 1.0, "max": -math.inf}


def evaluate_row(expr: Expression, x: list[float], weights: dict, policy: str) -> list[float]:
    """Value of `expr` for one row, by the contract's words, element by element."""
    if expr.op == "x":
        return x
    operands = [evaluate_row(a, x, weights, policy) for a in expr.args]
    if expr.op == "linear":
        w, b = weights[expr.weight]
        assert len(operands[0]) == len(w[0])
        return [
            sum(wi * ai for wi, ai in zip(row, operands[0], strict=True)) + bi for row, bi in zip(w, b, strict=True)
        ]
    if len(operands) == 2:
        width = (min if policy == "truncate" else max)(map(len, operands))
        operands = [(a + [IDENTITY[expr.op]] * (width - len(a)))[:width] for a in operands]
    return [SCALAR[expr.op](*values) for values in zip(*operands, strict=True)]


def tensors(rows, hidden, inner, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)

    return (
        make(rows, hidden),
        make(inner, hidden) / math.sqrt(hidden),
        make(inner),
        make(hidden, inner) / math.sqrt(inner),
        make(hidden),
        1 + make(hidden) / 10,
        make(hidden) / 10,
    )


CASES = [
    ("linear(gelu(linear(x,wb1)),wb2)", "truncate"),
    ("tanh(linear(gelu_erf(linear(x,wb1)),wb2))", "truncate"),
    ("identity(linear(add(relu2(linear(x,wb1)),softplus(x)),wb2))", "truncate"),
    ("linear(relu(mul(linear(x,wb1),x)),wb2)", "truncate"),
    ("linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)", "pad"),
    ("add(x,linear(swish(linear(leaky_relu(x),wb1)),wb2))", "pad"),
    ("max(sigmoid(x),mul(elu(x),linear(elu(linear(x,wb1)),wb2)))", "truncate"),
]
WIDE = [  # d above H, where padding widens x
    ("linear(add(linear(x,wb1),sigmoid(x)),wb2)", "pad"),
    ("linear(mul(tanh(x),linear(x,wb1)),wb2)", "pad"),
    ("linear(max(linear(x,wb1),x),wb2)", "pad"),
]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 7, 5), (2, 45, 7), (5, 9, 9)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize(("text", "policy"), CASES)
def test_values_by_the_definitions(text, policy, sizes):
    check_values(text, policy, *sizes)


@pytest.mark.parametrize(("text", "policy"), WIDE)
def test_values_where_padding_widens(text, policy):
    check_values(text, policy, 3, 7, 13)


def check_values(text, policy, rows, hidden, inner):
    x, w1, b1, w2, b2, *_ = tensors(rows, hidden, inner)
    expr = parse_expression(text)
    weights = {"wb1": (w1.tolist(), b1.tolist()), "wb2": (w2.tolist(), b2.tolist())}
    expected = [evaluate_row(expr, row, weights, policy) for row in x.tolist()]
    # Float64 on both sides; sums of up to 45 terms of order 1 in another order: a few hundred ulp at most.
    np.testing.assert_allclose(evaluate(expr, x, w1, b1, w2, b2, policy).numpy(), expected, rtol=1e-13, atol=1e-13)


def test_ffn_is_layer_norm_of_the_residual_sum():
    x, w1, b1, w2, b2, g, b = tensors(6, 45, 7)
    expr = parse_expression(CASES[0][0])
    total = x + evaluate(expr, x, w1, b1, w2, b2)
    centred = total - total.mean(-1, keepdim=True)
    expected = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12) * g + b
    torch.testing.assert_close(ffn(x, w1, b1, w2, b2, g, b, expr), expected, rtol=1e-12, atol=1e-12)
    bare = ffn(x, w1, b1, w2, b2, None, None, expr, return_ln=False)
    assert torch.equal(bare, evaluate(expr, x, w1, b1, w2, b2))


def test_dropout_is_the_documented_mask():
    x, w1, b1, w2, b2, g, b = tensors(4, 45, 9)
    expr = parse_expression(CASES[0][0])
    kept = dropout_mask(x.shape, 0.3, 99)
    total = x + kept * evaluate(expr, x, w1, b1, w2, b2) / 0.7
    expected = torch.nn.functional.layer_norm(total, (45,), g, b, 1e-12)
    result = ffn(x, w1, b1, w2, b2, g, b, expr, p_drop=0.3, seed=99)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_without_a_seed_torch_governs_dropout():
    args = (*tensors(4, 9, 7), parse_expression(CASES[0][0]))
    torch.manual_seed(3)
    first, second = (ffn(*args, p_drop=0.5) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ffn(*args, p_drop=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("text", "policy", "inner"), [*((*c, 4) for c in CASES), *((*c, 7) for c in WIDE)])
def test_gradients(text, policy, inner):
    args = [t.requires_grad_() for t in tensors(3, 5, inner)]
    expr = parse_expression(text)
    assert torch.autograd.gradcheck(
        lambda *a: ffn(*a, expr, policy=policy, p_drop=0.2, seed=1, eps=1e-5), args, fast_mode=True
    )


def test_strided_views_and_leading_shape():
    x, w1, b1, w2, b2, g, b = tensors(6, 45, 12)
    expr = parse_expression(CASES[2][0])
    views = w1[:7], b1[:7], w2[:, :7]
    copies = [v.clone(memory_format=torch.contiguous_format) for v in views]
    result = ffn(x.reshape(2, 3, 45), *views, b2, g, b, expr)
    torch.testing.assert_close(result.reshape(6, 45), ffn(x, *copies, b2, g, b, expr), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 9), (9,), (2, 0, 9)])
def test_empty_and_single_row(shape):
    _, *weights = tensors(1, 9, 5)
    x = torch.zeros(shape, dtype=torch.float64)
    assert ffn(x, *weights, parse_expression(CASES[0][0])).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_keep_their_dtype(dtype):
    args = tensors(3, 9, 5, dtype)
    assert ffn(*args, parse_expression(CASES[0][0])).dtype == dtype


def test_wrong_calls_name_the_argument():
    x, w1, b1, w2, b2, g, b = tensors(3, 9, 5)
    expr = parse_expression(CASES[0][0])
    with pytest.raises(ValueError, match=r"w2 has shape \(5, 9\), expected \(9, 5\)"):
        evaluate(expr, x, w1, b1, w2.T, b2)
    with pytest.raises(ValueError, match="b1 has shape"):
        evaluate(expr, x, w1, b2, w2, b2)
    with pytest.raises(ExpressionError, match="wb2 takes an operand 5 wide"):
        evaluate(parse_expression("add(linear(x,wb1),linear(x,wb2))"), x, w1, b1, w2, b2)
    with pytest.raises(ExpressionError, match="unknown width policy"):
        evaluate(expr, x, w1, b1, w2, b2, policy="crop")
    with pytest.raises(ValueError, match="ln_weight and ln_bias"):
        ffn(x, w1, b1, w2, b2, None, b, expr)
    with pytest.raises(ValueError, match="bare expression has no dropout"):
        ffn(x, w1, b1, w2, b2, g, b, expr, p_drop=0.1, return_ln=False)
    with pytest.raises(ValueError, match="p_drop must lie in"):
        ffn(x, w1, b1, w2, b2, g, b, expr, p_drop=1.5, seed=0)


def test_nan_and_infinity_pass_through():
    x, *weights = tensors(3, 9, 5)
    x[0, 0], x[1, 0] = math.nan, math.inf
    y = ffn(x, *weights, parse_expression(CASES[0][0]))
    assert torch.isnan(y[0]).all()
    assert torch.isnan(y[1]).all()
    assert torch.isfinite(y[2]).all()
