"""What a person sees: a live view on a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from search.console.progress import Reporter
from search.scoring.failures import by_reason

FAILURES = {"the loss is not finite at step #": 2, "out of memory": 1}


def shown(console):
    reporter = Reporter(console)
    with reporter.phase("stage1: candidates", 10) as bar:
        bar.update(3, "best 0.7100", failures=FAILURES)
    return console.file.getvalue()


def test_a_terminal_shows_best_rate_remaining_time_and_failures():
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor"))
    for part in (
        "3/10",
        "best 0.7100",
        "failed 2: the loss is not finite at step #",
        "failed 1: out of memory",
    ):
        assert part in text
    assert "\x1b[32m" in text  # colours
    last = text.rstrip("\n").rpartition("\n")[2]
    assert "stage 1: try FFN formulas and sizes: 3/10, best 0.7100, 3 failed, 0." in last  # what stays


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=100, color_system="truecolor"))
    assert "best 0.7100" in text
    assert "\x1b[32m" not in text


def test_elsewhere_lines_alone():
    text = shown(Console(file=io.StringIO(), width=200))
    assert text.startswith("stage 1: try FFN formulas and sizes: 3/10, best 0.7100, 3 failed, 0.")
    assert text.count("\n") == 1
    assert "\x1b" not in text


def test_a_phase_that_breaks_off_leaves_no_closing_line():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(KeyboardInterrupt):
        _break_off(Reporter(console))
    assert "warm up the first supernet on text: 1/5" not in console.file.getvalue()


def _break_off(reporter):
    with reporter.phase("warm-up", 5) as bar:
        bar.update(1)
        raise KeyboardInterrupt


def test_reasons_that_differ_in_numbers_are_one():
    found = by_reason(["loss 1.5e3 at step 7", "loss 2 at step 12", None, "layer2 broke"])
    assert found == {"loss # at step #": 2, "unknown": 1, "layer2 broke": 1}
