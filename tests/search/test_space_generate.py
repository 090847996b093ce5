"""Rules and generation of expressions, against brute-force enumeration by the rules' own words."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from engine.errors import UserError
from kernels.language.expression import GELU_FFN, Expression, ExpressionError, X, apply, linear, parse_expression
from kernels.language.operators import PAPER_BINARY, PAPER_UNARY
from kernels.language.widths import infer_width, weight_order
from search.space.generate import ExpressionGenerator
from search.space.rules import Rules, check

PAPER = Rules(540, (540, 270, 180, 135))
SPACES = {  # rules, and the heights enumerated
    "paper-widths": (Rules(540, (540, 270), "truncate", ("gelu",), ("max",)), (3, 4)),
    "two-activations": (Rules(540, (540, 270), "truncate", ("gelu", "tanh"), ()), (3, 4, 5)),
    "one-ratio": (Rules(540, (540,), "truncate", ("gelu",), ("mul",)), (3,)),
    "pad-wide": (Rules(192, (768, 384), "pad", ("gelu",), ("add",)), (3, 4)),
    "wide-and-narrow": (Rules(100, (200, 50), "truncate", ("elu",), ("add",)), (3, 4)),
}


def weights_of(tree: Expression) -> tuple[str, ...]:
    return tuple(weight_order(tree))


def sound(tree: Expression, rules: Rules) -> bool:
    """Whether a tree may be part of a valid expression; a tree that holds an unsound one is broken for sure."""
    kinds = ["activation" if a.op in rules.activations else a.op for a in (tree, *tree.args)]
    if len(tree.args) == 1 and kinds[0] == kinds[1]:
        return False
    if len(tree.args) == 2 and tree.args[0] == tree.args[1]:
        return False
    try:
        return all(infer_width(tree, rules.hidden, inner, rules.policy) for inner in rules.inners)
    except ExpressionError:
        return False


def enumerate_valid(rules: Rules, height: int) -> set[Expression]:
    """All valid expressions of exactly this height: trees are combined level by level, the last is checked whole."""
    by_height: list[dict[Expression, tuple[str, ...]]] = [{X: ()}]
    for level in range(1, height + 1):
        below = {t: w for trees in by_height for t, w in trees.items()}
        top = by_height[-1]
        needed = {"wb1", "wb2"} if level == height else set()
        made = [apply(op, t) for op in rules.activations for t, w in top.items() if needed <= {*w}]
        made += [linear(t, v) for v in ("wb1", "wb2") for t, w in top.items() if v not in w and needed <= {*w, v}]
        for (a, wa), (b, wb) in product(below.items(), repeat=2):
            if (a in top or b in top) and not {*wa} & {*wb} and needed <= {*wa, *wb}:
                made += [apply(op, a, b) for op in rules.binaries]
        by_height.append({t: weights_of(t) for t in made if sound(t, rules)})
    return {t for t in by_height[height] if t.height == height and check(t, rules) is None}


@pytest.fixture(scope="module", params=sorted(SPACES))
def small(request):
    rules, heights = SPACES[request.param]
    return ExpressionGenerator(rules), {h: enumerate_valid(rules, h) for h in heights}


def test_counts_are_exact(small):
    generator, valid = small
    assert {h: generator.count(h) for h in valid} == {h: len(v) for h, v in valid.items()}


def test_valid_expressions_are_drawn(small):
    """Only valid ones, and most of them soon.

    That all can be drawn follows from the exact counts: they are sums over the productions the draw chooses from, all
    of positive weight. Bushy trees are rare (1e-5 for the rarest of 222), so after 10,000 draws a tenth may be missing.
    """
    generator, valid = small
    rng = np.random.default_rng(0)
    for height, expected in valid.items():
        drawn = {generator.sample(rng, height) for _ in range(10_000 if len(expected) > 10 else 1000)}
        assert drawn <= expected
        assert len(drawn) >= 0.9 * len(expected)
        if len(expected) <= 10:
            assert drawn == expected


def test_all_paper_expressions_of_height_three():
    generator, rng = ExpressionGenerator(PAPER), np.random.default_rng(1)
    expected = enumerate_valid(PAPER, 3)
    assert len(expected) == generator.count(3) == 7 + 2 * 3 * 8
    assert {generator.sample(rng, 3) for _ in range(2000)} == expected


@pytest.mark.parametrize(
    "rules",
    [PAPER, Rules(768, (3072, 1536, 1024, 768), "pad"), Rules(541, (541, 270, 180, 135), "pad"), Rules(45, (45,)),
     Rules(7, (13, 7, 3, 1), "truncate"), Rules(540, (540, 270), "truncate", ("relu",), ()),
     Rules(540, (540, 270), "truncate", (), ("mul",)), Rules(540, (540, 270), max_height=9)],
    ids=str,
)  # fmt: skip
def test_every_draw_obeys_the_rules(rules):
    generator, rng = ExpressionGenerator(rules), np.random.default_rng(2)
    for _ in range(600):
        expr = generator.sample(rng)
        assert check(expr, rules) is None
        assert parse_expression(str(expr)) == expr


def test_heights_are_drawn_uniformly_and_shapes_vary():
    generator, rng = ExpressionGenerator(PAPER), np.random.default_rng(3)
    drawn = [generator.sample(rng) for _ in range(5000)]
    heights = Counter(e.height for e in drawn)
    assert set(heights) == {3, 4, 5, 6, 7}
    # Each is binomial(5000, 1/5): mean 1000, standard deviation 28; five of them.
    assert all(abs(n - 1000) < 5 * 28.3 for n in heights.values())
    operators = Counter(node.op for e in drawn for node in e.walk())
    assert set(operators) == {"x", "linear", *PAPER_UNARY, *PAPER_BINARY}
    assert len(set(drawn)) > 3000
    shapes = {tuple(len(n.args) for n in e.walk()) for e in drawn}
    assert len(shapes) > 800
    sizes = sorted(e.size for e in drawn)
    assert sizes[len(sizes) // 2] <= 12  # side branches are small
    assert sizes[-1] > 60  # but full trees occur


def test_full_trees_are_drawn():
    """A full binary layer of height 4, all leaves at one depth, and the same shape where one side is shallow."""
    generator, rng = ExpressionGenerator(PAPER), np.random.default_rng(4)

    def depths(e: Expression) -> set[int]:
        return {d + 1 for a in e.args for d in depths(a)} or {0}

    drawn = [generator.sample(rng, 5) for _ in range(500)]
    bushy = [e for e in drawn if sum(len(n.args) == 2 for n in e.walk()) >= 2]
    full = [e for e in bushy if len(depths(e)) == 1]
    assert 0.05 < len(full) / len(bushy) < 0.5


def test_seed_decides():
    generator = ExpressionGenerator(PAPER)
    first, second, third = ([generator.sample(np.random.default_rng(seed)) for _ in range(20)] for seed in (5, 5, 6))
    assert first == second
    assert first != third


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("linear(gelu(linear(x,wb2)),wb1)", "weights_once"),
        ("gelu(x)", "weights_once"),
        ("linear(gelu(linear(gelu(linear(x,wb1)),wb2)),wb2)", "weights_once"),
        ("linear(gelu_erf(linear(x,wb1)),wb2)", "known_operators"),
        ("linear(gelu(tanh(linear(x,wb1))),wb2)", "no_nested_activation: activation tanh"),
        ("gelu(linear(linear(x,wb1),wb2))", "no_nested_linear: linear wb1"),
        ("linear(mul(linear(x,wb1),add(x,x)),wb2)", "distinct_operands: both operands of add are x"),
        ("linear(mul(linear(x,wb1),add(tanh(x),tanh(x))),wb2)", "distinct_operands"),
        ("mul(x,add(x,mul(x,add(x,mul(x,linear(gelu(linear(x,wb1)),wb2))))))", "height_in_range: height 8"),
        ("add(x,linear(gelu(mul(linear(x,wb1),x)),wb2))", None),
        ("add(linear(x,wb1),linear(gelu(x),wb2))", "widths_fit: at hidden width 540 and inner width 270"),
        ("add(linear(gelu(linear(x,wb1)),wb2),x)", None),
    ],
)
def test_check_names_the_broken_rule(text, rule):
    broken = check(parse_expression(text), PAPER)
    assert broken is None if rule is None else broken.startswith(rule)


def test_released_expressions_are_in_the_paper_space():
    for text in ("tanh(linear(gelu(linear(x,wb1)),wb2))", "elu(linear(gelu(linear(x,wb1)),wb2))",
                 "sigmoid(linear(relu(linear(x,wb1)),wb2))", "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
                 "linear(relu(mul(linear(x,wb1),x)),wb2)", "leaky_relu(linear(gelu(linear(x,wb1)),wb2))"):  # fmt: skip
        assert check(parse_expression(text), PAPER) is None
        assert check(parse_expression(text), Rules(768, (3072, 1536, 1024, 768), "pad")) is None
    assert check(GELU_FFN, PAPER) is None


def test_a_space_without_expressions_is_refused():
    with pytest.raises(UserError, match=r"heights: no valid expression of height 3\.\.7 .*\(none\)"):
        ExpressionGenerator(Rules(540, (540, 270), activations=(), binaries=()))
    with pytest.raises(UserError, match="no valid expression"):
        ExpressionGenerator(Rules(540, (270,), "pad", (), ("mul",), 3, 3))


def test_a_height_without_expressions_is_refused():
    generator = ExpressionGenerator(Rules(540, (540, 270), "truncate", ("gelu",), ()))
    assert generator.heights == (3, 4, 5)
    with pytest.raises(ValueError, match="no valid expression of height 6"):
        generator.sample(np.random.default_rng(0), 6)
