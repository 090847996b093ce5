"""Fingerprints: equal exactly for equal functions, checked by brute force on other probes, and cheap."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from kernels.language.canonical import canonicalize
from kernels.language.expression import Expression, ExpressionError, parse_expression
from kernels.language.widths import validate
from kernels.reference.ffn import evaluate
from kernels.reference.fingerprint import fingerprint, statistics
from search.space.generate import ExpressionGenerator
from search.space.rules import Rules

SPACES = {
    "truncate-narrow": (Rules(24, (12, 8), "truncate"), 24, 12),
    "pad-wide": (Rules(12, (24, 18), "pad"), 12, 24),
}


def variants(expr: Expression, rng: random.Random) -> Expression:
    """The same function in another form: operands swapped, a + (b + c) regrouped (other rounding)."""
    operands = [variants(a, rng) for a in expr.args]
    if len(operands) == 2:
        if operands[1].op == expr.op and expr.op in ("add", "mul", "max") and rng.random() < 0.5:
            first, (second, third) = operands[0], operands[1].args
            operands = [Expression(expr.op, (first, second)), third]
        rng.shuffle(operands)
    return Expression(expr.op, tuple(operands), expr.weight)


def other_probes(hidden: int, inner: int) -> list[torch.Tensor]:
    """Probes that share nothing with the fingerprint's: normal instead of uniform, other scales, other weights."""
    g = torch.Generator().manual_seed(12345)

    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=g)

    x = torch.cat([make(3, hidden) * s for s in (0.1, 0.5, 1.0, 3.0, 10.0)])
    return [
        x,
        make(inner, hidden) / math.sqrt(hidden),
        make(inner),
        make(hidden, inner) / math.sqrt(inner),
        make(hidden),
    ]


@pytest.mark.parametrize("name", SPACES)
def test_same_fingerprint_exactly_for_same_function(name):
    """About 2200 expressions per space, brute force over all pairs (2.4 million) on independent probes."""
    rules, hidden, inner = SPACES[name]
    generator, rng, np_rng = ExpressionGenerator(rules), random.Random(0), np.random.default_rng(0)
    drawn = [generator.sample(np_rng) for _ in range(1100)]
    expressions = [*drawn, *(variants(e, rng) for e in drawn)]
    valid = [e for e in expressions if _valid(e, hidden, inner, rules.policy)]
    assert len(valid) >= 2000
    probes = other_probes(hidden, inner)
    values = torch.stack([torch.asinh(evaluate(e, *probes, policy=rules.policy)).flatten() for e in valid])
    distance = torch.cdist(values, values, p=math.inf)
    same_function = distance < 1e-9
    # The brute force itself is clear-cut: nothing lies between rounding (1e-13) and a real difference (1e-5).
    assert not ((distance > 1e-12) & (distance < 1e-6)).any()
    prints = np.array([fingerprint(e, hidden, inner, rules.policy) for e in valid])
    same_print = torch.from_numpy(prints[:, None] == prints[None, :])
    wrong = torch.nonzero(same_function != same_print)
    assert not len(wrong), [(str(valid[i]), str(valid[j])) for i, j in wrong[:3].tolist()]
    assert len(set(prints)) > 500


def _valid(expr, hidden, inner, policy):
    try:
        validate(expr, hidden, inner, policy)
    except ExpressionError:  # swapped operands may put wb2 first
        return False
    return True


EQUAL_BY_ALGEBRA = [
    ("linear(swish(linear(x,wb1)),wb2)", "linear(mul(linear(x,wb1),sigmoid(linear(x,wb1))),wb2)", False),
    ("linear(tanh(linear(swish(x),wb1)),wb2)", "linear(tanh(linear(mul(sigmoid(x),x),wb1)),wb2)", True),
    ("linear(add(add(linear(x,wb1),x),tanh(x)),wb2)", "linear(add(linear(x,wb1),add(tanh(x),x)),wb2)", True),
    ("linear(relu(linear(gelu(x),wb1)),wb2)", "linear(relu(linear(max(swish(x),gelu(x)),wb1)),wb2)", True),
    ("linear(add(linear(x,wb1),mul(relu(x),x)),wb2)", "linear(add(linear(x,wb1),mul(relu(x),relu(x))),wb2)", True),
]


@pytest.mark.parametrize("inner", [540, 270, 135])
@pytest.mark.parametrize(("left", "right", "valid"), EQUAL_BY_ALGEBRA)
def test_equal_functions_in_unlike_forms(left, right, valid, inner):
    a, b = parse_expression(left), parse_expression(right)
    if not valid:  # wb1 twice: not an FFN body
        with pytest.raises(ExpressionError, match="occurs 2 times"):
            fingerprint(b, 540, inner)
        return
    assert canonicalize(a) != canonicalize(b)
    assert fingerprint(a, 540, inner) == fingerprint(b, 540, inner)


def test_statistics_of_equal_functions_differ_by_rounding_only():
    """Cells are 1e-6 wide; rounding must stay far below (measured 4e-15 at H=540), or close pairs would be split."""
    for left, right, valid in EQUAL_BY_ALGEBRA:
        if valid:
            first, second = (statistics(parse_expression(t), 540, 270) for t in (left, right))
            assert (first - second).abs().max() < 1e-12


def test_small_differences_are_seen():
    """leaky_relu's slope, elu against swish, gelu against its erf form: near each other, yet other functions."""
    texts = [f"linear({op}(linear(x,wb1)),wb2)" for op in
             ("relu", "leaky_relu", "elu", "swish", "gelu", "gelu_erf", "tanh", "sigmoid", "relu2", "softplus",
              "identity")]  # fmt: skip
    assert len({fingerprint(parse_expression(t), 540, 180) for t in texts}) == len(texts)


def test_policies_differ_only_where_they_act():
    plain = parse_expression("linear(gelu(linear(x,wb1)),wb2)")
    mixed = parse_expression("max(linear(mul(linear(x,wb1),x),wb2),x)")
    assert fingerprint(plain, 12, 24, "pad") == fingerprint(plain, 12, 24, "truncate")
    assert fingerprint(mixed, 12, 12, "pad") == fingerprint(mixed, 12, 12, "truncate")
    assert fingerprint(mixed, 12, 24, "pad")
    with pytest.raises(ExpressionError, match="wb2 takes an operand 24 wide"):
        fingerprint(mixed, 12, 24, "truncate")


def test_fingerprints_do_not_change_between_versions():
    """A ledger is read by later versions: probes come from Philox, not from a library's generator."""
    assert fingerprint(parse_expression("linear(gelu(linear(x,wb1)),wb2)"), 45, 7) == "4616ebb2db253cbd"


def test_overflow_is_a_value_like_others():
    text = "x"
    for _ in range(10):
        text = f"mul({text},{text})"  # x^1024: infinite where |x| > 2
    a = fingerprint(parse_expression(f"add({text},linear(gelu(linear(x,wb1)),wb2))"), 45, 7)
    b = fingerprint(parse_expression(f"add(mul({text},{text}),linear(gelu(linear(x,wb1)),wb2))"), 45, 7)
    c = fingerprint(parse_expression(f"add(mul({text},x),linear(gelu(linear(x,wb1)),wb2))"), 45, 7)
    assert len({a, b, c}) == 3


def test_torch_state_is_left_alone():
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fingerprint(parse_expression("linear(elu(linear(x,wb1)),wb2)"), 45, 9)
    assert inside == fingerprint(parse_expression("linear(elu(linear(x,wb1)),wb2)"), 45, 9)
    first = statistics(parse_expression("linear(elu(linear(x,wb1)),wb2)"), 45, 9)
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_odd_sizes():
    for hidden in (1, 7, 45, 541):
        for inner in (1, 3, 541):
            assert len(fingerprint(parse_expression("tanh(linear(gelu(linear(x,wb1)),wb2))"), hidden, inner)) == 16
