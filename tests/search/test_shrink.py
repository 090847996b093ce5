"""`ffnas shrink` says the same as `ffnas search` with other words."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from search.cli import main
from search.config.options import parse
from search.shrink import translate


def test_words_become_options_of_search():
    argv = translate(["./model", "--train", "a.csv", "--dev=b.csv", "--speedup", "4", "--params", "8e6", "--seed", "3"])
    config, resume = parse(argv)
    assert resume is None
    assert (config.strategy, config.teacher, config.seed) == ("inherit", "./model", 3)
    assert (config.data.train, config.data.dev) == ("a.csv", "b.csv")
    assert config.budget.speedup == 4
    assert config.budget.params == [0, 8e6]


def test_share_and_latency():
    config, _ = parse(translate(["x", "--share", "0.125", "--latency-ms", "3"]))
    assert (config.budget.encoder, config.budget.latency_ms) == (0.125, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train", "a.csv"], "the teacher comes first"),
        (["x", "--params"], "--params needs a number"),
        (["x", "--speedup", "0.5"], "budget.speedup: 0.5 is out of range"),
        (["x", "--total", "2"], "budget.total: 2.0 is out of range"),
        (["x", "--share", "1.5"], "budget.encoder: 1.5 is out of range"),
    ],
)
def test_wrong_words_end_in_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse(translate(argv))


def test_help_needs_no_framework(capsys):
    assert main(["shrink", "--help"]) == 0
    assert "--speedup 4" in capsys.readouterr().out
