"""The canonical form: every rewrite is exact, the whole is idempotent and keeps values at all widths and policies."""

from __future__ import annotations

import math
import random

import pytest
import torch

from kernels.language.canonical import canonicalize
from kernels.language.expression import Expression, ExpressionError, X, apply, linear, parse_expression
from kernels.language.operators import BINARY, OPERATORS, UNARY
from kernels.language.widths import check_weights, validate
from kernels.reference.ffn import evaluate

SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 6e-8, -6e-8, 1.0, -1.0, 88.0, -88.0, 1e38, -1e38,
           math.inf, -math.inf, math.nan]  # fmt: skip


def random_tree(rng: random.Random, height: int, weights: tuple[str, ...] = ("wb1", "wb2")) -> Expression:
    """Any tree holding the weights in text order; nestings and repeated operands the search space forbids included."""
    if height == 0 and not weights:
        return X
    if weights and (height <= len(weights) or rng.random() < 0.3):
        return linear(random_tree(rng, height - 1, weights[:-1]), weights[-1])
    if height <= 0 or (not weights and rng.random() < 0.2):
        return X
    if rng.random() < 0.5:
        return apply(rng.choice(UNARY), random_tree(rng, height - 1, weights))
    cut = rng.choice([0, len(weights)])
    operands = random_tree(rng, height - 1, weights[:cut]), random_tree(rng, height - 1, weights[cut:])
    return apply(rng.choice(("max", *BINARY)), *operands)


def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit-equal up to the sign of zero and the payload of NaN."""
    return bool(((a == b) | (torch.isnan(a) & torch.isnan(b))).all())


def run_weightless(expr: Expression, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Value of an expression over x, linear(x,wb1) := y and linear(x,wb2) := z, elementwise."""
    if expr.op == "x":
        return x
    if expr.op == "linear":
        return y if expr.weight == "wb1" else z
    return OPERATORS[expr.op].forward(*(run_weightless(a, x, y, z) for a in expr.args))


def probe(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three values: every triple of special numbers, then random ones of magnitudes 2^-20..2^20."""
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    grid = torch.cartesian_prod(special, special, special).T
    g = torch.Generator().manual_seed(0)
    size = torch.pow(2.0, torch.empty(3, 20_000, dtype=torch.float64).uniform_(-20, 20, generator=g))
    noise = torch.randn(3, 20_000, dtype=torch.float64, generator=g) * size
    return tuple(torch.cat([grid, noise.to(dtype)], 1))


A, B = "linear(x,wb1)", "linear(x,wb2)"
REWRITES = [
    ("add(x,linear(x,wb1))", "add(linear(x,wb1),x)"),
    ("mul(tanh(x),x)", "mul(x,tanh(x))"),
    ("max(tanh(x),x)", "max(x,tanh(x))"),
    (f"max({A},{A})", A),
    (f"max({A},max(x,{A}))", f"max({A},x)"),
    (f"max(max({B},x),{A})", f"max(max({A},x),{B})"),
    (f"max(max(tanh(x),{A}),max({A},x))", f"max(max({A},x),tanh(x))"),
    ("max(x,relu(x))", "relu(x)"),
    ("max(leaky_relu(x),x)", "leaky_relu(x)"),
    ("max(leaky_relu(x),relu(x))", "relu(x)"),
    ("max(elu(x),relu(x))", "relu(x)"),
    (f"max(x,relu(max({A},x)))", f"relu(max({A},x))"),
    (f"max(x,leaky_relu(max({A},x)))", f"leaky_relu(max({A},x))"),
    ("relu(relu(x))", "relu(x)"),
    ("relu(sigmoid(x))", "sigmoid(x)"),
    ("elu(relu(x))", "relu(x)"),
    ("elu(sigmoid(x))", "sigmoid(x)"),
    ("leaky_relu(relu(x))", "relu(x)"),
    ("leaky_relu(sigmoid(x))", "sigmoid(x)"),
    ("relu(leaky_relu(x))", "relu(x)"),
    ("relu(elu(x))", "relu(x)"),
    ("relu(elu(leaky_relu(x)))", "relu(x)"),
    ("relu(tanh(relu(x)))", "tanh(relu(x))"),
    ("relu(gelu(relu(x)))", "gelu(relu(x))"),
    ("relu(gelu_erf(relu(x)))", "gelu_erf(relu(x))"),
    ("elu(swish(sigmoid(x)))", "swish(sigmoid(x))"),
    ("relu2(relu(x))", "relu2(x)"),
    ("relu2(elu(leaky_relu(x)))", "relu2(x)"),
    ("relu(relu2(x))", "relu2(x)"),
    ("elu(softplus(x))", "softplus(x)"),
    ("identity(identity(tanh(identity(x))))", "tanh(x)"),
    ("max(identity(x),relu(identity(x)))", "relu(x)"),
    (f"add(identity({A}),{B})", f"add({A},{B})"),
    ("relu(mul(x,x))", "mul(x,x)"),
    (f"elu(mul(relu({A}),sigmoid(x)))", f"mul(relu({A}),sigmoid(x))"),
    (f"relu(add(relu({A}),sigmoid(x)))", f"add(relu({A}),sigmoid(x))"),
    (f"relu(max(x,sigmoid({B})))", f"max(x,sigmoid({B}))"),
]
KEPT = [
    "max(x,elu(x))",  # a rounded exp(a) - 1 may lie below a
    "max(gelu(x),relu(x))",  # gelu(-inf) is NaN
    "max(swish(x),relu(x))",
    "relu(tanh(x))",
    "add(x,add(tanh(x),relu(x)))",  # addition is not associative in floating point
    "elu(elu(x))",
    "leaky_relu(leaky_relu(x))",
    "max(relu2(x),relu(x))",
    "relu2(softplus(x))",
    f"relu(max({A},sigmoid(x)))",  # padding to d > H shows wb1 alone
]


@pytest.mark.parametrize(("text", "canonical"), REWRITES)
def test_rewrites_are_made_and_exact(text, canonical):
    expr = parse_expression(text)
    assert str(canonicalize(expr)) == canonical
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        values = probe(dtype)
        assert equal(run_weightless(expr, *values), run_weightless(canonicalize(expr), *values)), dtype


@pytest.mark.parametrize("text", KEPT)
def test_inexact_rewrites_are_not_made(text):
    expr = parse_expression(text)
    assert sorted(node.op for node in canonicalize(expr).walk()) == sorted(node.op for node in expr.walk())


def test_sign_rule_minds_padding():
    """Equal widths are needed to call max(a, b) non-negative for the sake of one operand."""
    mixed, same = parse_expression(f"relu(max({A},sigmoid(x)))"), parse_expression(f"relu(max({B},sigmoid(x)))")
    assert canonicalize(mixed).op == "relu"
    assert canonicalize(same).op == "max"


def test_random_expressions_keep_their_values():
    """2000 random trees at narrow and wide inner widths under both policies, where they are valid."""
    rng = random.Random(0)
    g = torch.Generator().manual_seed(0)
    checked = changed = 0
    for _ in range(2000):
        expr = random_tree(rng, rng.randint(3, 6))
        canonical = canonicalize(expr)
        assert canonicalize(canonical) == canonical
        check_weights(canonical)
        for hidden, inner, policy in (
            (7, 3, "truncate"),
            (7, 3, "pad"),
            (7, 9, "pad"),
            (7, 9, "truncate"),
            (7, 7, "pad"),
        ):
            try:
                validate(expr, hidden, inner, policy)
            except ExpressionError:
                with pytest.raises(ExpressionError):
                    validate(canonical, hidden, inner, policy)
                continue
            shapes = ((5, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,))
            args = [torch.randn(*s, dtype=torch.float64, generator=g) for s in shapes]
            assert equal(evaluate(expr, *args, policy=policy), evaluate(canonical, *args, policy=policy)), str(expr)
            checked += 1
        changed += canonical != expr
    assert checked > 1500
    assert changed > 1000


def test_gradients_are_kept():
    rng = random.Random(1)
    g = torch.Generator().manual_seed(1)
    checked = 0
    while checked < 200:
        expr = random_tree(rng, rng.randint(3, 5))
        canonical = canonicalize(expr)
        try:
            validate(expr, 7, 7)
        except ExpressionError:
            continue
        args = [torch.randn(*s, dtype=torch.float64, generator=g, requires_grad=True)
                for s in ((5, 7), (7, 7), (7,), (7, 7), (7,))]  # fmt: skip
        first, second = (
            torch.autograd.grad(evaluate(e, *args).sum(), args, allow_unused=True) for e in (expr, canonical)
        )
        for a, b in zip(first, second, strict=True):
            # Same derivative, summed along other paths of the tree: rounding only.
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * (1 + float(a.abs().max())))
        checked += 1


def test_operand_order_does_not_matter():
    rng = random.Random(2)

    def shuffled(expr: Expression) -> Expression:
        operands = [shuffled(a) for a in expr.args]
        rng.shuffle(operands)
        return Expression(expr.op, tuple(operands), expr.weight)

    for _ in range(300):
        expr = random_tree(rng, rng.randint(3, 6))
        assert canonicalize(shuffled(expr)) == canonicalize(expr)
