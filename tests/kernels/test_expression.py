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
    assert ", ".join(map(str, layers)) == RELEASED


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


PIECES = ["(", ")", ",", " ", LEAF, "linear2_3", "linear2_3/4", "none", "@3", LINEAR, *WEIGHTS, *OPERATORS]


@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=400, deadline=None)
def test_any_text_parses_or_raises_expression_error(text):
    try:
        layers = parse_layers(text)
    except ExpressionError:
        return
    assert parse_layers(",".join(map(str, layers))) == layers


def test_builders_refuse_what_the_language_lacks():
    with pytest.raises(ExpressionError, match="unknown weight"):
        linear(X, "wb3")
    with pytest.raises(ExpressionError, match="unknown operator"):
        apply("exp", X)
    with pytest.raises(ExpressionError, match="takes 2"):
        apply("add", X)
    with pytest.raises(ExpressionError, match="both stack and ratio"):
        X.text(stack=2)


def test_layers_without_ffn_with_heads_and_with_other_ratios():
    text = "linear2_3/8(gelu(linear2_3/8(x,wb1)),wb2), none, kron1_2(gelu(linear1_2(x,wb1)),wb2)@6, none@0"
    layers = parse_layers(text)
    assert [(p.stack, p.ratio, p.heads) for p in layers] == [
        (2, Fraction(3, 8), None), (0, Fraction(1), None), (1, Fraction(1, 2), 6), (0, Fraction(1), 0),
    ]  # fmt: skip
    assert ", ".join(map(str, layers)) == text
    assert parse_layer("linear1_6/8(gelu(linear1_3/4(x,wb1)),wb2) @07").ratio == Fraction(3, 4)
    assert parse_layer("linear1_1/2(x,wb1)").ratio == Fraction(1, 2)
    assert str(parse_layer("linear(x,wb1)@2")) == "linear(x,wb1)@2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none(x)", "expected ',' or the end"),
        ("gelu(none)", "unknown operator 'none'"),
        ("@3", "expected an operator or x, found '@3'"),
        ("x@", "unexpected character '@'"),
        ("x@-1", "unexpected character '@'"),
        ("x@1@2", "expected ',' or the end, found '@2'"),
        ("x@999999999", "@ and a number of heads"),
        ("gelu(x@2)", "expected"),
        ("linear1_2/(x,wb1)", "unexpected character '/'"),
        ("linear1_2/0(x,wb1)", "unknown operator 'linear1_2/0'"),
        ("linear1_2/3/4(x,wb1)", "unexpected character '/'"),
        ("linear1_3/8(gelu(linear1_8(x,wb1)),wb2)", "must be the same"),
        ("gelu/2(x)", "unknown operator 'gelu/2'"),
    ],
)
def test_malformed_layers_are_refused(text, message):
    with pytest.raises(ExpressionError, match=message):
        parse_layers(text)


@pytest.mark.parametrize("text", ["none", "none@0", "linear(gelu(linear(x,wb1)),wb2)@6"])
def test_an_expression_is_not_a_layer(text):
    with pytest.raises(ExpressionError, match="without heads"):
        parse_expression(text)


def test_a_pickled_expression_has_the_hash_of_the_process_that_reads_it():
    text = "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)"
    code = "import pickle, sys; from kernels import parse_expression as p; "
    code += f"sys.stdout.buffer.write(pickle.dumps(p({text!r})))"
    written = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "4711"}, stdout=subprocess.PIPE, check=True
    ).stdout
    assert {pickle.loads(written): 1}[parse_expression(text)] == 1
