"""What is particular to each strategy: neighbourhoods, genes, features, populations; and that each of them learns."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from test_samplers import Objective, ToySpace, choices, learning, run, trial

from engine.architecture.architecture import Architecture
from engine.architecture.params import ffn_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression
from search.samplers import SAMPLERS, make_sampler, sampler_options
from search.samplers.gaussian import PREDICT_TRIALS, Kernel, correlation, fit, informative, predict
from search.samplers.genome import categories, express, genes
from search.samplers.neighbours import edits, neighbours
from search.space import SearchSpace
from search.space.features import features, names, places

SHAPE = ModelShape(48, 3, 48, vocab_size=500, embedding_size=16, teacher_hidden_size=64)


def stages():
    """The spaces of the three stages."""
    space = SearchSpace(SHAPE)
    first = space.sample(np.random.default_rng(0))
    return {
        1: space,
        2: space.with_shapes([(s.stack, s.ratio) for s in first.layers]),
        3: space.with_expressions([s.expression for s in first.layers]),
    }


MARGINS = {
    "partition": 0.5,
    "evolution": 0.5,
    "local": 0.5,
    "tpe": 0.5,
    "nsga2": 0.2,
    "gaussian": 1.0,
}
"""Asserted lead over random search, in standard deviations of the space. The published greedy partition has none."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ("tpe", "nsga2") else n for n in MARGINS]
)
def test_every_strategy_beats_random_search(name):
    """120 trials, 8 objectives over 16^6 architectures with 0.3 sd of noise, true score of the best-looking one."""
    space, leads = ToySpace(), []
    for seed in range(8):
        objective = Objective(seed)
        rng = np.random.default_rng(seed)
        spread = np.std([objective(space.sample(rng)) for _ in range(300)])
        best = {}
        for one in ("random", name):
            noise = np.random.default_rng(1000 + seed)
            found, scores = run(
                learning(one, space, seed),
                lambda a, noise=noise, objective=objective: objective(a) + 0.3 * noise.normal(),
                120,
            )
            best[one] = objective(found[int(np.argmax(scores))])
        leads.append((best[name] - best["random"]) / spread)
    assert np.mean(leads) > MARGINS[name], leads


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLERS)
def test_real_spaces_without_repetition_inside_the_budget(name, stage):
    space = stages()[stage]
    options = {"startup": 8} if "startup" in sampler_options(name) else {}
    options |= {"population": 8} if "population" in sampler_options(name) else {}
    sampler = make_sampler(name, space, 0, **options)
    score = lambda a: sum(s.stack - s.expression.size for s in a.layers) / 100  # noqa: E731
    found, _ = run(sampler, score, 24, batch=3)
    assert all(space.contains(a) for a in found)
    assert len({space.key(a) for a in found}) == 24


@pytest.mark.parametrize("name", ["evolution", "local", "tpe", "nsga2", "gaussian"])
@pytest.mark.parametrize("score", [lambda a: 0.5, lambda a: None, lambda a: 1e300 * (-1) ** a.layers[0].stack])
def test_awkward_scores(name, score, recwarn):
    space = ToySpace()
    options = {"population": 10} if "population" in sampler_options(name) else {"startup": 10}
    found, _ = run(make_sampler(name, space, 0, **options), score, 40)
    assert len({space.key(a) for a in found}) == 40
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evolution", {"population": 0}),
        ("evolution", {"tournament": 0}),
        ("local", {"startup": 0}),
        ("tpe", {"startup": 0}),
        ("nsga2", {"population": 1}),
        ("gaussian", {"startup": -1}),
        ("gaussian", {"refit_every": 0}),
    ],
)
def test_senseless_options_are_refused(name, options):
    with pytest.raises(ValueError, match="must be"):
        make_sampler(name, ToySpace(), 0, **options)


def test_a_state_without_own_part_is_refused():
    state = learning("local").state_dict()
    del state["own"]
    with pytest.raises(UserError, match="is damaged"):
        learning("local").load_state_dict(state)


# evolution


def test_evolution_breeds_from_the_youngest_only():
    space = ToySpace()
    sampler = make_sampler("evolution", space, 0, population=5, tournament=50)
    rng = np.random.default_rng(0)
    old, young = ([space.sample(rng) for _ in range(5)] for _ in range(2))
    sampler.observe([trial(i, a, 10.0 + i) for i, a in enumerate(old)])
    sampler.observe([trial(5 + i, a, float(i)) for i, a in enumerate(young)])
    for child in sampler.propose(10):  # the tournament is as good as certain to hold the best of the young
        differing = sum(a != b for a, b in zip(choices(child), choices(young[4]), strict=True))
        assert differing == 1


# local


def test_local_visits_the_whole_neighbourhood_and_then_starts_again():
    space = ToySpace(layers=2)
    sampler = make_sampler("local", space, 0, startup=3)
    start = space.all()[0]
    sampler.observe([trial(i, a, float(-i)) for i, a in enumerate([start, *space.all()[100:102]])])
    around = {space.key(a) for a in neighbours(space, start)}
    # 15 other choices in each of 2 layers; exchanging two equal ones is no step
    assert len(around) == 30
    found, _ = run(sampler, lambda a: -1.0, 30)
    assert {space.key(a) for a in found} == around
    run(sampler, lambda a: -1.0, 1)
    assert sampler.state_dict()["own"]["begin"] == 33


def test_local_moves_to_what_is_better():
    space = ToySpace()
    objective = Objective(0)
    found, scores = run(make_sampler("local", space, 1, startup=1), objective, 60)
    best = int(np.argmax(scores))
    assert best > 10
    earlier = [(a, s) for a, s in zip(found[:best], scores[:best], strict=True)]
    here = max(earlier, key=lambda e: e[1])[0]
    assert sum(a != b for a, b in zip(choices(found[best]), choices(here), strict=True)) <= 2


# neighbourhoods


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_neighbours_are_one_step_away_and_in_the_space(stage):
    space = stages()[stage]
    here = space.sample(np.random.default_rng(1))
    found = list(neighbours(space, here))
    assert len(found) > 10
    for one in found:
        assert space.contains(one)
        assert one != here
        changed = [i for i, (a, b) in enumerate(zip(one.layers, here.layers, strict=True)) if a != b]
        assert len(changed) in (1, 2)
        if len(changed) == 2:
            i, j = changed
            assert (one.layers[i].stack, one.layers[i].ratio) == (here.layers[j].stack, here.layers[j].ratio)


def test_edits_of_the_hand_made_ffn():
    found = {str(e) for e in edits(GELU_FFN, ("gelu", "relu"), ("add",))}
    assert "linear(relu(linear(x,wb1)),wb2)" in found
    assert "linear(linear(x,wb1),wb2)" in found  # not valid, for the space to say
    assert "relu(linear(gelu(linear(x,wb1)),wb2))" in found
    assert "linear(gelu(linear(relu(x),wb1)),wb2)" in found
    assert str(GELU_FFN) not in found


def test_an_edit_never_loses_a_weight():
    expression = parse_expression("add(linear(gelu(linear(x,wb1)),wb2),tanh(x))")
    for edited in edits(expression, ("gelu", "tanh"), ("add", "mul")):
        assert str(edited).count("wb1") == str(edited).count("wb2") == 1


# features and genes


def test_features_say_what_a_layer_is_and_costs():
    architecture = Architecture.parse("linear2_3(gelu(linear2_3(x,wb1)),wb2), relu(linear1_1(linear1_1(x,wb1),wb2))")
    stacks, ratios = (1, 2), (Fraction(1), Fraction(1, 3))
    rows = features(architecture, ModelShape(48, 2, 48), stacks, ratios)
    column = {name: i for i, name in enumerate(names(stacks, ratios))}
    assert rows.shape == (2, len(column))
    assert [rows[0, column[n]] for n in ("stack_1", "stack_2", "ratio_1", "ratio_1/3")] == [0, 1, 0, 1]
    assert rows[0, column["mid_gelu"]] == rows[0, column["root_linear"]] == rows[0, column["pre_x"]] == 1
    assert rows[1, column["root_relu"]] == rows[1, column["mid_linear"]] == 1
    assert rows[0, column["count_linear"]] == 2
    assert rows[0, column["cost"]] == ffn_parameters(48, 16, 2) / 48**2
    assert rows[0, [column["stack"], column["ratio"]]].tolist() == [2, 1 / 3]
    assert places(architecture.layers[1].expression) == ("relu", "linear", "x")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_genes_go_back_to_an_architecture_that_has_them(stage):
    space, rng = stages()[stage], np.random.default_rng(2)
    known = categories(space, 3)
    for _ in range(10):
        architecture = space.sample(rng)
        wanted = genes(space, architecture)
        assert set(wanted) == set(known)
        assert all(value in known[name] for name, value in wanted.items())
        other = space.sample(rng)
        assert genes(space, express(space, wanted, other, [other, architecture], rng)) == wanted


# the Gaussian process


def test_the_posterior_is_that_of_the_textbook():
    """Against the formulas with explicit inverses, in float64: rounding only."""
    rng = np.random.default_rng(0)
    known, at = rng.normal(size=(30, 2, 3)), rng.normal(size=(7, 2, 3))
    values = rng.normal(size=30)
    kernel = Kernel(0.8, (0.4, 0.3, 0.3), 0.1)
    mean, deviation = predict(kernel, known, values, at)
    k = correlation(kernel, known, known) + 0.1 * np.eye(30)
    cross = correlation(kernel, known, at)
    centred = values - values.mean()
    signal = centred @ np.linalg.inv(k) @ centred / 30
    np.testing.assert_allclose(mean, values.mean() + cross.T @ np.linalg.inv(k) @ centred, rtol=1e-8)
    variance = signal * (1 - np.einsum("nm,nk,km->m", cross, np.linalg.inv(k), cross))
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-6)


def test_the_kernel_is_one_and_falls_with_distance():
    rows = np.arange(6.0)[:, None, None] * np.ones((1, 2, 2))
    k = correlation(Kernel(1.0, (0.5, 0.2, 0.3), 0.0), rows, rows)
    np.testing.assert_allclose(np.diag(k), 1.0)
    assert all(k[0, i] > k[0, j] for i, j in combinations(range(6), 2))


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_kernel_is_the_weighted_mean_of_single_layers_pairs_and_all(layers):
    """Against loops over layers and pairs; a pair of one layer alone counts as that layer."""
    a, b = np.random.default_rng(layers).normal(size=(2, layers, 3))
    each = [np.exp(-((x - y) ** 2).sum() / (2 * 0.7**2)) for x, y in zip(a, b, strict=True)]
    pairs = [x * y for x, y in combinations(each, 2)] or each
    expected = 0.5 * np.mean(each) + 0.3 * np.mean(pairs) + 0.2 * np.prod(each)
    found = correlation(Kernel(0.7, (0.5, 0.3, 0.2), 0.0), a[None], b[None])
    np.testing.assert_allclose(found, [[expected]], rtol=1e-12)


@pytest.mark.parametrize("noise", [0.01, 1.0])
def test_the_noise_is_found(noise):
    rng = np.random.default_rng(3)
    known = rng.uniform(-1, 1, size=(150, 2, 1))
    truth = np.sin(3 * known[:, 0, 0]) + np.cos(2 * known[:, 1, 0])
    found = fit(known, truth + np.sqrt(noise) * truth.std() * rng.normal(size=150))
    assert found.noise <= 0.1 if noise < 0.1 else found.noise >= 0.3


def test_a_batch_of_the_gaussian_sampler_spreads():
    sampler = learning("gaussian", seed=3)
    run(sampler, Objective(2), 30)
    found = sampler.propose(6)
    pairs = [sum(x != y for x, y in zip(choices(a), choices(b), strict=True)) for a, b in combinations(found, 2)]
    assert np.mean(pairs) > 1.0


def test_scale_and_ratio_features_do_not_depend_on_the_sampler_seed():
    first, second = (make_sampler("gaussian", stages()[3], seed, startup=2) for seed in (0, 1))
    for sampler in (first, second):
        run(sampler, lambda a: float(a.layers[0].stack), 3)
    np.testing.assert_array_equal(first._scale, second._scale)


@pytest.mark.parametrize("number", [1, PREDICT_TRIALS, PREDICT_TRIALS + 1, 7 * PREDICT_TRIALS + 3])
def test_the_gaussian_predicts_from_a_bounded_number_of_trials(number):
    values = np.random.default_rng(number).permutation(number).astype(float)
    used = informative(values)
    assert len(used) == min(number, PREDICT_TRIALS) == len(set(used.tolist()))
    assert list(used) == sorted(used)
    best = np.flatnonzero(values >= number - min(number, PREDICT_TRIALS // 2))
    assert set(best) <= set(used)
    others = np.setdiff1d(used, best)
    if number > 2 * PREDICT_TRIALS:  # of every tenth of the run about as many
        shares = np.histogram(others, bins=10, range=(0, number))[0]
        assert shares.min() > 0.7 * len(others) / 10
