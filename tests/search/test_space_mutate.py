"""Mutations: always valid, always another function form, small steps, every kind in use."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from kernels.language.canonical import canonicalize
from kernels.language.expression import GELU_FFN, parse_expression
from search.space import mutate
from search.space.generate import ExpressionGenerator
from search.space.rules import Rules, check

PAPER = Rules(540, (540, 270, 180, 135))
GENERATOR = ExpressionGenerator(PAPER)
OPERATORS = [mutate.replace_subtree, mutate.replace_operator, mutate.insert, mutate.delete]


def test_children_are_valid_and_differ():
    rng = np.random.default_rng(0)
    for _ in range(400):
        parent = GENERATOR.sample(rng)
        child = mutate.mutate_expression(parent, GENERATOR, rng)
        assert check(child, PAPER) is None
        assert canonicalize(child) != canonicalize(parent)


@pytest.mark.parametrize("rules", [Rules(768, (3072, 1536, 1024), "pad"), Rules(45, (45,)), Rules(7, (13, 3))], ids=str)
def test_children_are_valid_in_other_spaces(rules):
    generator, rng = ExpressionGenerator(rules), np.random.default_rng(1)
    for _ in range(150):
        child = mutate.mutate_expression(generator.sample(rng), generator, rng)
        assert check(child, rules) is None


def test_a_parent_from_outside_the_space_gets_a_child_inside():
    outside = parse_expression("linear(gelu_erf(linear(x,wb1)),wb2)")
    rng = np.random.default_rng(2)
    assert all(check(mutate.mutate_expression(outside, GENERATOR, rng), PAPER) is None for _ in range(50))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda f: f.__name__)
def test_every_operator_gives_valid_children(operator):
    rng = np.random.default_rng(3)
    parents = [GENERATOR.sample(rng) for _ in range(300)]
    children = [operator(parent, GENERATOR, rng) for parent in parents]
    valid = [c for c in children if c is not None and check(c, PAPER) is None]
    assert len(valid) > 60


def test_what_each_operator_does():
    rng = np.random.default_rng(4)
    parent = parse_expression("linear(gelu(mul(linear(x,wb1),x)),wb2)")
    for _ in range(50):
        changed = mutate.replace_operator(parent, GENERATOR, rng)
        assert changed.size == parent.size
        assert sum(a.op != b.op for a, b in zip(changed.walk(), parent.walk(), strict=True)) == 1
        assert mutate.insert(parent, GENERATOR, rng).size > parent.size
        shorter = mutate.delete(parent, GENERATOR, rng)
        assert str(shorter) in ("linear(mul(linear(x,wb1),x),wb2)", "linear(gelu(linear(x,wb1)),wb2)")


def test_steps_are_small():
    """Half of all children differ from their parent in at most 4 nodes (as multisets of operators)."""
    rng = np.random.default_rng(5)
    distances = []
    for _ in range(300):
        parent = GENERATOR.sample(rng)
        child = mutate.mutate_expression(parent, GENERATOR, rng)
        a, b = (Counter(n.op for n in e.walk()) for e in (parent, child))
        distances.append(sum(((a - b) + (b - a)).values()))
    assert np.median(distances) <= 4


def test_mutation_reaches_everything_of_a_small_space():
    """Walking from GELU by mutations alone visits all 55 expressions of height 3."""
    rules = Rules(540, (540, 270), max_height=3)
    generator, rng = ExpressionGenerator(rules), np.random.default_rng(6)
    current, seen = GELU_FFN, {GELU_FFN}
    for _ in range(3000):
        current = mutate.mutate_expression(current, generator, rng)
        seen.add(current)
    assert len(seen) == generator.count(3) == 55


def test_a_space_of_one_expression_has_no_child():
    generator = ExpressionGenerator(Rules(540, (540, 270), "truncate", ("gelu",), (), 3, 3))
    assert generator.count(3) == 1
    assert mutate.mutate_expression(GELU_FFN, generator, np.random.default_rng(0)) is None
