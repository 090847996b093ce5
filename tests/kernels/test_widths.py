"""Width inference under both policies, against a by-hand table and against the shapes the reference produces."""

from __future__ import annotations

import pytest

from kernels.language.expression import ExpressionError, parse_expression
from kernels.language.widths import check_weights, infer_width, validate


@pytest.mark.parametrize(
    ("text", "hidden", "inner", "policy", "width"),
    [
        ("x", 45, 7, "truncate", 45),
        ("linear(x,wb1)", 45, 7, "truncate", 7),
        ("tanh(linear(x,wb1))", 45, 7, "pad", 7),
        ("add(x,linear(x,wb1))", 45, 7, "truncate", 7),
        ("add(x,linear(x,wb1))", 45, 7, "pad", 45),
        ("add(linear(x,wb1),x)", 7, 45, "truncate", 7),
        ("add(linear(x,wb1),x)", 7, 45, "pad", 45),
        ("max(x,mul(x,x))", 1, 1, "pad", 1),
        ("linear(linear(x,wb1),wb2)", 540, 541, "truncate", 540),
        ("linear(mul(linear(x,wb1),x),wb2)", 540, 135, "truncate", 540),
        ("linear(mul(linear(x,wb1),x),wb2)", 135, 540, "pad", 135),
        ("linear(x,wb2)", 9, 9, "truncate", 9),
    ],
)
def test_widths_by_hand(text, hidden, inner, policy, width):
    assert infer_width(parse_expression(text), hidden, inner, policy) == width


def test_error_names_the_node_and_both_widths():
    with pytest.raises(ExpressionError, match=r"linear\(mul\(linear\(x,wb1\),x\),wb2\): wb2 takes an operand 135 wide, "
                       r"but mul\(linear\(x,wb1\),x\) is 540 wide"):  # fmt: skip
        infer_width(parse_expression("linear(mul(linear(x,wb1),x),wb2)"), 540, 135, "pad")
    with pytest.raises(ExpressionError, match=r"wb1 takes an operand 540 wide, but .* is 270 wide"):
        infer_width(parse_expression("linear(gelu(linear(x,wb1)),wb1)"), 540, 270)


def test_validate_accepts_bodies_of_hidden_width():
    validate(parse_expression("linear(gelu(linear(x,wb1)),wb2)"), 45, 7)
    validate(parse_expression("add(linear(x,wb1),linear(x,wb2))"), 45, 45)


def test_validate_names_both_widths_of_a_wrong_output():
    body = parse_expression("max(linear(tanh(x),wb2),linear(x,wb1))")
    with pytest.raises(ExpressionError, match="wb2 stands before wb1"):
        validate(body, 9, 9)
    truncated = parse_expression("max(linear(x,wb1),tanh(linear(gelu(x),wb2)))")
    with pytest.raises(ExpressionError, match="wb2 takes an operand 7 wide, but gelu\\(x\\) is 9 wide"):
        validate(truncated, 9, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "wb1 occurs 0 times"),
        ("linear(x,wb1)", "wb2 occurs 0 times"),
        ("linear(add(linear(x,wb1),linear(x,wb1)),wb2)", "wb1 occurs 2 times"),
        ("linear(gelu(linear(x,wb2)),wb1)", "wb2 stands before wb1"),
    ],
)
def test_weights_occur_once_and_in_order(text, message):
    with pytest.raises(ExpressionError, match=message):
        check_weights(parse_expression(text))


@pytest.mark.parametrize(
    ("hidden", "inner", "policy", "message"),
    [
        (0, 1, "pad", "hidden width"),
        (1, -1, "pad", "inner width"),
        (True, 1, "pad", "hidden width"),
        (1, 2.0, "pad", "inner width"),
        (1, 1, "crop", "unknown width policy 'crop'"),
    ],
)
def test_unusable_arguments_are_named(hidden, inner, policy, message):
    with pytest.raises(ExpressionError, match=message):
        infer_width(parse_expression("x"), hidden, inner, policy)


def test_output_of_wrong_width_is_refused():
    """With d above H and the pad policy a residual with the d-wide value makes the body d wide."""
    body = parse_expression("add(linear(x,wb1),linear(gelu(linear(x,wb1)),wb2))")
    with pytest.raises(ExpressionError, match="occurs 2 times"):
        validate(body, 7, 45, "pad")
    assert infer_width(body, 7, 45, "pad") == 45
    assert infer_width(body, 7, 45, "truncate") == 7
