"""The parser of expressions: both text forms, errors that name the place, and bounds on hostile input."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.language.expression import (
    GELU_FFN,
    MAX_DEPTH,
    MAX_TEXT,
    Expression,
    ExpressionError,
    X,
    apply,
    linear,
    parse_expression,
    parse_layer,
    parse_layers,
)
from kernels.language.operators import BINARY, LEAF, LINEAR, OPERATORS, UNARY, WEIGHTS

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)),"
    " sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2),"
    " linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)


def trees(max_leaves: int = 12) -> st.SearchStrategy[Expression]:
    """Any tree of the language, valid as an FFN body or not."""
    return st.recursive(
        st.just(X),
        lambda inner: st.one_of(
            st.builds(linear, inner, st.sampled_from(WEIGHTS)),
            st.builds(apply, st.sampled_from(UNARY), inner),
            st.builds(apply, st.sampled_from(BINARY), inner, inner),
        ),
        max_leaves=max_leaves,
    )


def test_plain_form():
    assert parse_expression("linear(gelu(linear(x,wb1)),wb2)") == GELU_FFN
    assert str(GELU_FFN) == "linear(gelu(linear(x,wb1)),wb2)"
    assert GELU_FFN.height == 3
    assert GELU_FFN.size == 4
    assert parse_layer("linear(gelu(linear(x,wb1)),wb2)").stack is None


def test_published_form_carries_stack_and_ratio():
    layer = parse_layer("tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2))")
    assert (layer.stack, layer.ratio) == (4, Fraction(1, 2))
    assert layer.expression == apply("tanh", GELU_FFN)
    assert layer.expression.text(4, Fraction(1, 2)) == "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2))"


def test_released_layers_print_as_they_were_read():
    layers = parse_layers(RELEASED)
    assert [(p.stack, p.ratio.denominator) for p in layers] == [(4, 2), (2, 1), (1, 2), (2, 2), (1, 2), (2, 3)]
    assert ", ".join(p.expression.text(p.stack, p.ratio) for p in layers) == RELEASED


def test_white_space_between_tokens_is_ignored():
    assert parse_expression(" linear ( gelu(\tlinear(x , wb1)) ,\nwb2 ) ") == GELU_FFN


@given(trees())
@settings(max_examples=200, deadline=None)
def test_text_round_trips(expr):
    assert parse_expression(str(expr)) == expr
    if any(node.op == LINEAR for node in expr.walk()):
        layer = parse_layer(expr.text(3, Fraction(1, 4)))
        assert (layer.expression, layer.stack, layer.ratio) == (expr, 3, Fraction(1, 4))
    assert expr.size == len(list(expr.walk()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found the end"),
        ("x x", "position 2"),
        ("y", "unknown operator 'y' at position 0"),
        ("softmax(x)", "known operators are linear, kron, add"),
        ("gelu(x", "expected '\\)', found the end"),
        ("gelu x", "expected '\\('"),
        ("gelu()", "expected an operator or x"),
        ("gelu(x,x)", "'gelu' takes 1 operand\\(s\\), got 2"),
        ("add(x)", "'add' takes 2 operand\\(s\\), got 1"),
        ("add(x,x,x)", "got 3"),
        ("linear(x)", "expected ','"),
        ("linear(x,wb3)", "expected wb1 or wb2"),
        ("linear(x,x)", "expected wb1 or wb2"),
        ("linear(x,wb1,wb2)", "expected '\\)'"),
        ("linear0_1(x,wb1)", "unknown operator"),
        ("linear1_0(x,wb1)", "unknown operator"),
        ("linear10000_1(x,wb1)", "unknown operator"),
        ("linear4_2(gelu(linear4_3(x,wb1)),wb2)", "must be the same"),
        ("linear(gelu(linear4_3(x,wb1)),wb2)", "mixed linear forms"),
        ("gelu(x);", "unexpected character ';' at position 7"),
        ("gelu(__import__('os'))", "unexpected character"),
        ("x,", "found the end"),
        ("x,x", "expected one expression, found 2"),
        ("wb1", "unknown operator 'wb1'"),
        ("gélu(x)", "unexpected character 'é'"),
        ("x\x00", "unexpected character"),
    ],
)
def test_errors_name_what_was_found(text, message):
    with pytest.raises(ExpressionError, match=message) as error:
        parse_expression(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, 3, b"x", ["x"]])
def test_only_text_is_parsed(text):
    with pytest.raises(ExpressionError, match="an expression is text"):
        parse_expression(text)


def test_depth_and_length_are_bounded():
    deepest = "gelu(" * MAX_DEPTH + "x" + ")" * MAX_DEPTH
    assert parse_expression(deepest).height == MAX_DEPTH
    with pytest.raises(ExpressionError, match=f"deeper than {MAX_DEPTH}"):
        parse_expression("gelu(" + deepest + ")")
    with pytest.raises(ExpressionError, match="deeper"):
        parse_expression("gelu(" * (MAX_TEXT // 5))  # must not reach Python's recursion limit
    with pytest.raises(ExpressionError, match="longer than"):
        parse_expression(" " * (MAX_TEXT + 1))


@given(st.text(max_size=60) | st.lists(st.sampled_from(["(", ")", ",", " ", LEAF, "linear2_3", LINEAR, *WEIGHTS,
                                                         *OPERATORS]), max_size=40).map("".join))  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_raises_expression_error(text):
    try:
        layers = parse_layers(text)
    except ExpressionError:
        return
    assert parse_layers(",".join(str(layer.expression) for layer in layers))


def test_builders_refuse_what_the_language_lacks():
    with pytest.raises(ExpressionError, match="unknown weight"):
        linear(X, "wb3")
    with pytest.raises(ExpressionError, match="unknown operator"):
        apply("exp", X)
    with pytest.raises(ExpressionError, match="takes 2"):
        apply("add", X)
    with pytest.raises(ExpressionError, match="both stack and ratio"):
        X.text(stack=2)
    with pytest.raises(ExpressionError, match="must be 1/k"):
        GELU_FFN.text(2, Fraction(2, 3))


def test_a_pickled_expression_has_the_hash_of_the_process_that_reads_it():
    text = "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)"
    code = "import pickle, sys; from kernels import parse_expression as p; "
    code += f"sys.stdout.buffer.write(pickle.dumps(p({text!r})))"
    written = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "4711"}, stdout=subprocess.PIPE, check=True
    ).stdout
    assert {pickle.loads(written): 1}[parse_expression(text)] == 1
