"""Latency tables in a search: used with their error said and the limit tightened, or refused where that is no use."""

from dataclasses import replace

import pytest
from latency_toys import toy_table

from engine.errors import UserError
from search.config.latency_tables import conditions, describe, stated, table_for
from search.config.schema import BudgetConfig, ObjectiveConfig, SearchConfig, StudentConfig
from search.config.space import build_space, student_shape

STUDENT = StudentConfig(hidden_size=48, num_layers=3, num_heads=4, embedding_size=8)
SLOWER = tuple((1 + k / 20, 1.05 * (1 + k / 20)) for k in range(40))
"""Measurements 5 % above predictions."""


class Lines(list):
    """A reporter that keeps what it is told."""

    def info(self, line):
        self.append(line)


@pytest.fixture
def search(tmp_path):
    """Configuration, space and the lines said, for a limit and a table with this check."""

    def made(limit, pairs, **objectives):
        config = SearchConfig(student=STUDENT, budget=BudgetConfig(params=[0, 1e9], latency_ms=limit))
        config.objectives = ObjectiveConfig(latency_table=str(tmp_path / "table.json"), **objectives)
        shape = student_shape(config, 99, 48)
        table = toy_table(shape, pairs=pairs)
        replace(table, conditions=conditions(config)).save(tmp_path / "table.json")
        lines = Lines()
        return config, shape, lines, lambda: table_for(config, build_space(config, shape), 4, lines)

    return made


def test_a_table_that_is_off_serves_and_says_by_how_much(search):
    config, shape, lines, get = search(2.1, SLOWER)
    table = get()
    (line,) = lines
    assert "off by 4.8% on average, 4.8% at worst, rank correlation 1.000, on 40 architectures" in line  # 0.05 / 1.05
    assert line.endswith("; for at most 2.1 ms it has to predict at most 2")
    limits = build_space(config, shape, table).limits
    assert limits.latency_ms == pytest.approx(2.0)
    told = stated(table, 2.1)
    assert (told["architectures"], told["allowed_ms"]) == (40, pytest.approx(2.0))
    assert told["mean_error"] == pytest.approx(0.05 / 1.05)


def test_low_rank_correlation_alone_refuses_nothing(search):
    pairs = tuple((2 + k / 1000, 2.04 - k / 1000) for k in range(40))
    _, _, lines, get = search(2.5, pairs)
    assert get().check.rank_correlation == pytest.approx(-1)
    assert "rank correlation -1.000" in lines[0]


def test_a_limit_that_cannot_be_trusted_is_refused_with_both_remedies(search):
    pairs = tuple((1 + k / 20, (1 + k / 20) * (0.8 if k % 2 else 1.2)) for k in range(40))
    _, _, lines, get = search(2.0, pairs)
    with pytest.raises(UserError, match="cannot be trusted with a limit") as error:
        get()
    for words in ("UNFIT, a tenth of its predictions near 2 ms are off by 20.0% or more", "15% is accepted"):
        assert words in str(error.value)
    for remedy in ("ffnas latency --build-table", "--objectives.unfit_table true"):
        assert remedy in str(error.value)
    assert lines == []
    _, _, lines, get = search(2.0, pairs, unfit_table=True)
    assert get().allowed(2.0) == pytest.approx(2 / 1.2)
    assert "UNFIT" in lines[0]


def test_without_a_limit_all_of_the_check_counts(search):
    _, _, lines, get = search(None, SLOWER)
    assert describe(get()) in lines[0]
    assert "for at most" not in lines[0]
