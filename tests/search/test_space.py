"""The search space as a whole: paper numbers, validity, stages, keys, features, wrong configuration."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from engine.architecture.architecture import Architecture, LayerSpec, uniform
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression
from search.space import NoNeighbour, SearchSpace

PAPER_SHAPE = ModelShape(540, 6, 540, teacher_hidden_size=768)
RELEASED = Architecture.parse(
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)),"
    " sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2),"
    " linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)


@pytest.fixture(scope="module")
def paper():
    return SearchSpace.from_config(PAPER_SHAPE, budget=[15e6, 16e6])


def small_space(**options):
    """Two layers of a tiny student: 16^2 shapes, all countable."""
    return SearchSpace(ModelShape(24, 2, 24, 100, 8), **options)


def test_paper_numbers(paper):
    assert paper.count_shapes() == 4_480_424  # "4.48 M of 16^6"
    assert paper.contains(RELEASED)
    assert paper.parameters(RELEASED) == 15_737_724
    assert paper.generator.count(3) == 55
    assert paper.budget == (15_000_000, 16_000_000)


def test_samples_are_valid_and_in_budget(paper):
    rng = np.random.default_rng(0)
    for _ in range(300):
        arch = paper.sample(rng)
        assert paper.violation(arch) is None
        assert 15_000_000 <= count_parameters(arch, PAPER_SHAPE) <= 16_000_000


def test_mutations_are_valid_near_and_new(paper):
    rng = np.random.default_rng(1)
    arch, touched, shapes_changed, expressions_changed = paper.sample(rng), [], 0, 0
    for _ in range(300):
        child = paper.mutate(arch, rng)
        assert paper.violation(child) is None
        assert paper.key(child) != paper.key(arch)
        pairs = list(zip(arch.layers, child.layers, strict=True))
        touched.append(sum(a != b for a, b in pairs))
        shapes_changed += any((a.stack, a.ratio) != (b.stack, b.ratio) for a, b in pairs)
        expressions_changed += any(a.expression != b.expression for a, b in pairs)
        arch = child
    assert np.median(touched) == 1
    assert min(shapes_changed, expressions_changed) > 75


def test_mutation_from_outside_the_budget_comes_back_inside(paper):
    rng = np.random.default_rng(2)
    for outside in (uniform(GELU_FFN, 4, Fraction(1), 6), uniform(GELU_FFN, 5, Fraction(1, 7), 6)):
        assert not paper.contains(outside)
        assert all(paper.contains(paper.mutate(outside, rng)) for _ in range(10))


def test_every_shape_in_the_budget_is_reached_uniformly():
    space, rng = small_space(), np.random.default_rng(3)
    inside = [s for s in product(space.shapes, repeat=2)
              if space.contains(Architecture(tuple(LayerSpec(GELU_FFN, *x) for x in s)))]  # fmt: skip
    assert space.count_shapes() == len(inside)
    only_shapes = space.with_expressions([GELU_FFN] * 2)
    seen = Counter(tuple((s.stack, s.ratio) for s in only_shapes.sample(rng).layers) for _ in range(40 * len(inside)))
    assert set(seen) == set(inside)
    chi_square = sum((n - 40) ** 2 / 40 for n in seen.values())  # five standard deviations of chi-square
    assert abs(chi_square - len(inside) + 1) < 5 * np.sqrt(2 * len(inside))


def test_stages_fix_their_part(paper):
    rng = np.random.default_rng(4)
    stage2 = paper.with_shapes([(s.stack, s.ratio) for s in RELEASED.layers])
    stage3 = paper.with_expressions([s.expression for s in RELEASED.layers])
    assert stage2.count_shapes() == 1
    for _ in range(30):
        second, third = stage2.sample(rng), stage3.sample(rng)
        for arch in (second, stage2.mutate(second, rng)):
            assert [(s.stack, s.ratio) for s in arch.layers] == [(s.stack, s.ratio) for s in RELEASED.layers]
            assert paper.contains(arch)
            assert stage2.contains(arch)
        for arch in (third, stage3.mutate(third, rng)):
            assert [s.expression for s in arch.layers] == [s.expression for s in RELEASED.layers]
            assert stage3.contains(arch)
    assert "fixed" in stage3.violation(second)
    assert "fixed" in stage2.violation(third)
    assert stage2.budget == stage3.budget == paper.budget


def test_stage3_reaches_all_neighbours_of_an_architecture():
    """From one architecture, mutation reaches every other assignment of a small space."""
    space, rng = small_space().with_expressions([GELU_FFN] * 2), np.random.default_rng(5)
    arch, seen = space.sample(rng), set()
    for _ in range(40 * space.count_shapes()):
        arch = space.mutate(arch, rng)
        seen.add(space.key(arch))
    assert len(seen) == space.count_shapes()


def test_mutation_without_a_neighbour():
    space = small_space(stacks=[2], ratios=["1/2"]).with_expressions([GELU_FFN] * 2)
    only = space.sample(np.random.default_rng(0))
    with pytest.raises(NoNeighbour):
        space.mutate(only, np.random.default_rng(0))


def test_gelu_seeds(paper):
    seeds = paper.gelu_seeds()
    assert len(seeds) == len(set(seeds)) == 16
    assert all(paper.contains(seed) for seed in seeds)
    assert all(spec.expression == GELU_FFN for seed in seeds for spec in seed.layers)
    alike = [seed for seed in seeds if len(set(seed.layers)) == 1]
    fitting = [s for s in paper.shapes if paper.contains(uniform(GELU_FFN, *s, 6))]
    assert len(alike) == len(fitting)
    shapes = [(s.stack, s.ratio) for s in RELEASED.layers]
    twin = Architecture(tuple(LayerSpec(GELU_FFN, *s) for s in shapes))
    assert paper.with_shapes(shapes).gelu_seeds() == [twin]
    assert paper.with_expressions([s.expression for s in RELEASED.layers]).gelu_seeds() == []
    assert SearchSpace(PAPER_SHAPE, activations=["relu"]).gelu_seeds() == []


def test_keys(paper):
    first, second = (
        Architecture((LayerSpec(parse_expression(text), 2, "1/2"), *RELEASED.layers[1:]))
        for text in ("linear(swish(linear(swish(x),wb1)),wb2)", "linear(swish(linear(mul(sigmoid(x),x),wb1)),wb2)")
    )
    assert paper.key(first) != paper.key(second)  # not by exact rewrites
    assert paper.function_key(first) == paper.function_key(second)  # but numerically
    assert paper.function_key(first) != paper.function_key(RELEASED)
    assert paper.key(RELEASED) == RELEASED.key("truncate")


def test_encoding(paper):
    names = paper.feature_names()
    features = dict(zip(names, paper.encode(RELEASED), strict=True))
    assert len(names) == len(set(names)) == len(features)
    assert features["layer0.stack"] == 4
    assert features["layer0.ratio"] == 0.5
    assert features["layer0.height"] == 4
    assert features["layer3.count_max"] == 1
    assert features["layer3.size"] == 7
    assert features["layer4.activation_mid"] == 1
    assert features["layer4.residual"] == 0
    assert features["total.params_in_window"] == pytest.approx(0.737724)
    shares = sum(features[f"layer{i}.params_share"] for i in range(6))
    ffns = 15_737_724 - count_parameters(RELEASED, PAPER_SHAPE) * (1 - shares)
    assert ffns == pytest.approx(shares * 15_737_724)
    # tanh linear2 gelu linear1 x, then padding: ids by the documented vocabulary
    assert [features[f"layer0.token_{i}"] for i in range(6)] == [9, 3, 7, 2, 1, 0]


def test_encoding_has_one_length_and_tells_architectures_apart(paper):
    rng = np.random.default_rng(6)
    rows = np.array([paper.encode(paper.sample(rng)) for _ in range(100)])
    assert rows.shape == (100, len(paper.feature_names()))
    assert np.isfinite(rows).all()
    assert len(np.unique(rows, axis=0)) == 100
    residual = uniform(parse_expression("add(x,linear(gelu(linear(x,wb1)),wb2))"), 2, Fraction(1, 2), 6)
    assert dict(zip(paper.feature_names(), paper.encode(residual), strict=True))["layer0.residual"] == 1


def test_seed_decides(paper):
    def walk(seed):
        rng = np.random.default_rng(seed)
        arch = paper.sample(rng)
        return [arch := paper.mutate(arch, rng) for _ in range(10)]

    assert walk(7) == walk(7)
    assert walk(7) != walk(8)


@pytest.mark.parametrize(
    "shape",
    [ModelShape(768, 6, 3072, embedding_size=None, teacher_hidden_size=768), ModelShape(541, 3, 541),
     ModelShape(384, 12, 1536, teacher_hidden_size=384), ModelShape(45, 1, 45, 99, 7), ModelShape(8, 4, 8, 99, 7)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("policy", ["truncate", "pad"])
def test_other_shapes(shape, policy):
    space, rng = SearchSpace(shape, policy=policy), np.random.default_rng(9)
    arch = space.sample(rng)
    for _ in range(10):
        arch = space.mutate(arch, rng)
        assert space.violation(arch) is None
        assert space.encode(arch).shape == (len(space.feature_names()),)


def test_budget_none_is_the_middle_third(paper):
    low, high = paper.reachable()
    space = SearchSpace(PAPER_SHAPE)
    assert space.budget[0] == pytest.approx(low + (high - low) / 3, abs=1)
    assert space.budget[1] == pytest.approx(high - (high - low) / 3, abs=1)
    two = small_space(stacks=[1, 4], ratios=[1]).with_expressions([GELU_FFN] * 2)
    assert two.count_shapes() > 0  # nothing but the ends lies there: the whole range is taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": [1, 2]}, r"no architecture has 1\.\.2 parameters; this space reaches 12712014\.\.25875324"),
        ({"budget": [15.5e6, 15.5e6]}, "nearest to the window 15499359 and 15500979"),
        ({"budget": [16e6, 15e6]}, "two numbers in order"),
        ({"budget": [1]}, "budget.params: must be"),
        ({"budget": "15e6"}, "budget.params: must be a list"),
        ({"budget": [float("nan"), 1e9]}, "budget.params: must be"),
        ({"budget": [0, float("inf")]}, "budget.params: must be"),
        ({"budget": [True, 5]}, "budget.params: must be"),
        ({"heights": [2, 7]}, "space.heights: must be"),
        ({"heights": [5, 4]}, "space.heights: must be"),
        ({"heights": [3, 13]}, "space.heights: must be"),
        ({"heights": [3]}, "space.heights: must be"),
        ({"heights": [3, 4.0]}, "space.heights: must be"),
        ({"heights": 7}, "space.heights: must be a list"),
        ({"stacks": []}, "space.stacks: the list is empty"),
        ({"stacks": [0]}, "space.stacks: stack: must be"),
        ({"stacks": [1.0]}, "space.stacks: stack: must be"),
        ({"ratios": ["2/3"]}, "space.ratios: ratio: must be 1/k"),
        ({"ratios": "1/2"}, "space.ratios: must be a list"),
        ({"activations": ["softmax"]}, "space.activations: 'softmax' is not one; known are gelu"),
        ({"binaries": ["gelu"]}, "space.binaries: 'gelu' is not one"),
        ({"activations": [], "binaries": []}, "no valid expression"),
        ({"policy": "crop"}, "space.policy: 'crop' is not known"),
        ({"depth": 3}, "space.depth: unknown option"),
        ({"fixed_shapes": [(1, 1)]}, "fixed_shapes: 1 given for 6 layers"),
        ({"fixed_shapes": [(9, 1)] * 6}, r"fixed_shapes\[0\]: stack 9 with ratio 1 is not in the space"),
        ({"fixed_shapes": [(4, 1)] * 6, "budget": [15e6, 16e6]}, "the fixed shapes have 25875324 parameters"),
        ({"fixed_expressions": [GELU_FFN]}, "fixed_expressions: 1 given for 6 layers"),
        (
            {"fixed_expressions": [parse_expression("add(linear(x,wb1),linear(x,wb2))")] * 6},
            r"fixed_expressions\[0\]: not valid at every ratio: .*wb2 takes an operand 270 wide",
        ),
    ],
)
def test_wrong_configuration_is_one_clear_line(options, message):
    with pytest.raises(UserError, match=message) as error:
        SearchSpace.from_config(PAPER_SHAPE, **options)
    assert "\n" not in str(error.value)


def test_a_ratio_too_small_for_the_width():
    with pytest.raises(UserError, match="leaves an inner width of 0"):
        SearchSpace(ModelShape(3, 1, 3, 99, 7), ratios=["1/4"])


def test_violations_name_the_layer(paper):
    def broken(index, spec):
        layers = list(RELEASED.layers)
        layers[index] = spec
        return paper.violation(Architecture(tuple(layers)))

    assert "layers" in paper.violation(uniform(GELU_FFN, 1, Fraction(1), 5))
    assert broken(2, LayerSpec(GELU_FFN, 5, 1)).startswith("layer 2: stack 5 with ratio 1")
    nested = parse_expression("linear(gelu(tanh(linear(x,wb1))),wb2)")
    assert broken(3, LayerSpec(nested, 2, "1/2")).startswith("layer 3: no_nested_activation")
    assert "outside the budget" in broken(0, LayerSpec(GELU_FFN, 4, 1))
    with pytest.raises(UserError, match="the architecture has 5, the space 6"):
        paper.mutate(uniform(GELU_FFN, 1, Fraction(1), 5), np.random.default_rng(0))


@pytest.mark.parametrize("layer", ["none", "none@0", "linear1_1(gelu(linear1_1(x,wb1)),wb2)@2",
                                   "linear1_3/4(gelu(linear1_3/4(x,wb1)),wb2)"])  # fmt: skip
def test_pruned_layers_are_of_no_space(layer):
    space = small_space(stacks=[1], ratios=[1])
    plain = "linear1_1(gelu(linear1_1(x,wb1)),wb2)"
    assert space.violation(Architecture.parse(f"{plain}, {plain}")) is None
    arch = Architecture.parse(f"{plain}, {layer}")
    assert "layer 1" in space.violation(arch)
    with pytest.raises(UserError, match=r"layers\[1\]: spaces have layers with all heads"):
        space.features(arch)
