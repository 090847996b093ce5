"""Latency tables: fitted costs against known ones, prediction, check, files; one real table end to end."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.latency.build import Clock, build_table, fit_costs
from engine.latency.table import Check, Conditions, LatencyTable, program_class
from kernels.language.expression import GELU_FFN, parse_expression
from search.space import SearchSpace

SHAPE = ModelShape(24, 3, 24, vocab_size=50, embedding_size=8)
SPACE = SearchSpace(SHAPE, budget=(0, 1e9))
AT = Conditions(sequence_length=8, hardware="made up")


def draw(count, seed):
    rng = np.random.default_rng(seed)
    return [SPACE.sample(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def truth():
    """A table whose costs are known, over the operators that occur in `draw`."""
    rng = np.random.default_rng(9)
    table = fit_costs(SHAPE, 4, "truncate", SPACE.stacks, SPACE.ratios, AT, [None, *draw(80, 1)], [1.0] * 81)
    return replace(
        table,
        fixed=2.0,
        layers={(n, r): 0.1 + n * (0.2 + float(r)) for n, r in table.layers},
        parallel=0.3,
        segments={"pre": 1e-3, "post": 2e-3},
        operators={name: float(rng.uniform(1e-4, 3e-3)) for name in table.operators},
    )


def milliseconds(table, arch):
    return table.fixed if arch is None else table.predict(arch)


def test_costs_are_found_again_from_exact_latencies(truth):
    archs = [None, *draw(80, 1)]
    found = fit_costs(
        SHAPE, 4, "truncate", SPACE.stacks, SPACE.ratios, AT, archs, [milliseconds(truth, a) for a in archs]
    )
    for arch in draw(30, 2):  # float64 least squares on 81 rows: far below 1e-6 relative
        assert found.predict(arch) == pytest.approx(truth.predict(arch), rel=1e-6)
    assert found.fixed == pytest.approx(2.0, rel=1e-6)


def test_costs_from_noisy_latencies_rank_other_architectures(truth):
    rng = np.random.default_rng(4)
    archs = [None, *draw(100, 1)]
    noisy = [milliseconds(truth, a) * float(1 + 0.02 * rng.random()) for a in archs]
    found = fit_costs(SHAPE, 4, "truncate", SPACE.stacks, SPACE.ratios, AT, archs, noisy)
    others = draw(50, 3)
    check = Check.of([found.predict(a) for a in others], [truth.predict(a) for a in others])
    assert check.rank_correlation > 0.95
    assert check.mean_error < 0.02  # the noise lies in 0..2 %
    assert min(found.layers.values()) >= 0
    assert min(found.operators.values()) >= 0


def test_a_table_that_ranks_wrongly_is_unfit(truth):
    assert not truth.fit
    assert replace(truth, check=Check((), 0.951, 0.0, 0.0)).fit
    assert not replace(truth, check=Check((), 0.949, 0.0, 0.0)).fit
    check = Check.of([1.0, 2.0, 4.0], [1.0, 4.0, 2.0])
    assert check.rank_correlation == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert (check.mean_error, check.worst_error) == (pytest.approx(0.5), pytest.approx(1.0))


def test_equal_programs_are_one_class():
    a, b = "linear(gelu(linear(add(x,tanh(x)),wb1)),wb2)", "linear(gelu(linear(add(tanh(x),x),wb1)),wb2)"
    assert program_class(parse_expression(a)) == program_class(parse_expression(b))
    kind = program_class(parse_expression(a))
    assert kind.operators == (("mid", "gelu", 1), ("pre", "add", 1), ("pre", "tanh", 1))
    assert kind.segments == ("pre",)
    assert not kind.parallel
    assert program_class(parse_expression("add(linear(x,wb1),linear(tanh(x),wb2))")).parallel


def test_tables_survive_their_file(truth, tmp_path):
    table = replace(truth, check=Check(((1.0, 1.5), (2.0, 2.5)), 0.96, 0.1, 0.2))
    table.save(tmp_path / "t.json")
    assert LatencyTable.load(tmp_path / "t.json") == table
    raw = json.loads((tmp_path / "t.json").read_text())
    raw.pop("layers_ms")
    (tmp_path / "t.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"t.json: is damaged \('layers_ms'\): build it again"):
        LatencyTable.load(tmp_path / "t.json")
    with pytest.raises(UserError, match=r"cannot be read .*build it with ffnas latency --build-table"):
        LatencyTable.load(tmp_path / "none.json")


def test_what_a_table_has_not_is_named(truth):
    arch = Architecture((LayerSpec(GELU_FFN, 5, Fraction(1)),) * 3)
    with pytest.raises(UserError, match="no entry for stack 5, ratio 1"):
        truth.predict(arch)
    odd = parse_expression("linear(gelu_erf(linear(x,wb1)),wb2)")
    with pytest.raises(UserError, match="no cost of operator gelu_erf"):
        truth.predict(Architecture((LayerSpec(odd, 1, Fraction(1)),) * 3))


def test_the_clock_runs_what_it_is_given():
    """The exchanged stacks compute what a model of that architecture computes, and nothing at all without FFNs."""
    clock = Clock(SHAPE, 4, "truncate", AT, SPACE.stacks, SPACE.ratios)
    arch = draw(1, 5)[0]
    seen = []
    for index, bank in enumerate(clock.banks):
        for ratio, stack in bank.items():
            stack.register_forward_pre_hook(
                lambda _, given, i=index, r=ratio: seen.append((i, r, given[1].stack, given[1].inner))
            )
    clock.use(arch)
    clock.seconds()
    assert seen == [(i, s.ratio, s.stack, SPACE.inner_width(s.ratio)) for i, s in enumerate(arch.layers)]
    clock.use(None)
    clock.seconds()
    assert len(seen) == len(arch.layers)


def test_a_measured_table_is_complete_and_checked():
    threads = torch.get_num_threads()
    clock = Clock(SHAPE, 4, "truncate", AT, SPACE.stacks, SPACE.ratios)
    table = build_table(clock, draw(40, 1), draw(6, 2), rounds=(2, 2))
    assert torch.get_num_threads() == threads
    assert len(table.check.pairs) == 6
    assert set(table.layers) == set(SPACE.shapes)
    assert all(p > 0 and m > 0 for p, m in table.check.pairs)
    # a few rounds on a busy machine prove no more than the order of magnitude
    assert table.check.mean_error < 1.0
