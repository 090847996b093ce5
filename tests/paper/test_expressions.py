"""Expressions of the published generator that only run at ratio 1: refused in a mixed space, at home in one of ratio 1.

The published code finds out by running them. `wb2` reads a value as wide as the hidden state there, or the result is as
wide as `wb1` makes it; both are the hidden width at ratio 1 alone.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from paper_student import PaperStudent, Sizes, gelu, initialise, texts

from engine.architecture.architecture import Architecture
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.published.convert import from_published
from kernels.language.expression import parse_expression
from search.space import SearchSpace
from search.space.rules import Rules, check

ALONE = {
    "gelu(add(linear(gelu(x),wb1),linear(x,wb2)))": lambda x, f, s: gelu(f(gelu(x)) + s(x)),
    "max(tanh(linear(x,wb1)),sigmoid(linear(relu(x),wb2)))": lambda x, f, s: torch.maximum(
        f(x).tanh(), s(x.relu()).sigmoid()
    ),
    "mul(linear(max(x,tanh(x)),wb1),gelu(linear(x,wb2)))": lambda x, f, s: f(torch.maximum(x, x.tanh())) * gelu(s(x)),
    "linear(add(x,relu(linear(x,wb1))),wb2)": lambda x, f, s: s(x + f(x).relu()),
}
"""Texts, and what they compute. The last one runs at every ratio under `truncate`, and at ratio 1 under `pad`."""


def rules(*inners, policy="truncate"):
    return Rules(hidden=24, inners=inners, policy=policy)


@pytest.mark.parametrize("text", list(ALONE)[:3])
def test_only_a_space_of_ratio_one_takes_them(text):
    expression = parse_expression(text)
    assert check(expression, rules(24)) is None
    assert "widths_fit" in check(expression, rules(24, 12))
    assert "widths_fit" in check(expression, rules(12))


def test_the_last_depends_on_the_policy():
    expression = parse_expression(list(ALONE)[3])
    assert check(expression, rules(24, 12)) is None
    assert check(expression, rules(24, policy="pad")) is None
    assert "widths_fit" in check(expression, rules(24, 12, policy="pad"))


def space(*ratios):
    shape = ModelShape(24, 2, 24, vocab_size=61, embedding_size=7, teacher_hidden_size=11)
    return SearchSpace(shape, stacks=(1, 2), ratios=tuple(map(Fraction, ratios)))


def test_a_space_of_ratio_one_proposes_them():
    """Among a few hundred draws; none in a space with other ratios, whose draws all run at all of them."""

    def alone(drawn):
        return [e for a in drawn for e in {s.expression for s in a.layers} if check(e, rules(24, 12)) is not None]

    rng = np.random.default_rng(0)
    assert alone([space("1").sample(rng) for _ in range(60)])
    assert not alone([space("1", "1/2").sample(rng) for _ in range(60)])


@pytest.mark.parametrize("text", ALONE)
def test_they_compute_what_they_say(text):
    """Converted at ratio 1, answers and gradients beside the oracle's."""
    layers = [(ALONE[text], 2, 1)] * 2
    oracle = initialise(PaperStudent(Sizes(24, 24), layers), wide=True)
    written = ", ".join([text.replace("linear(", "linear2_1(")] * 2)
    model = from_published(oracle.state_dict(), Architecture.parse(written)).model
    ids, segments, padding = texts(61, 9)
    expected = oracle(ids, segments, padding).logits
    got = model(input_ids=ids, token_type_ids=segments, attention_mask=padding == 0).logits
    assert (got - expected).abs().max() <= 1e-5
    got.square().sum().backward()
    expected.square().sum().backward()
    weights = dict(oracle.named_parameters())
    for name in ("encoder.0.all_ffn.1.dense1.weight", "encoder.0.all_ffn.0.dense2.weight"):
        own, wanted = model.get_parameter(f"ffnas.{name}").grad, weights[name].grad
        assert (own - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())


def test_below_ratio_one_they_are_refused_by_name():
    text = next(iter(ALONE)).replace("linear(", "linear1_2(")
    oracle = PaperStudent(Sizes(24, 24), [(lambda x, f, s: x, 1, 2)])
    with pytest.raises(UserError, match=r"layers\[0\]\.expression: .*wb2 takes an operand 12 wide"):
        from_published(oracle.state_dict(), Architecture.parse(text))
