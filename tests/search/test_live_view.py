"""A terminal shows a sign of life at all times, in a pseudo-terminal; estimates of remaining time wait for evidence."""

import fcntl
import itertools
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from search.console.pace import Pace, in_words
from search.inherit.last_round import _costs, rungs_of

REPO = Path(__file__).resolve().parents[2]
SILENCE = 2.0
"""Seconds in which something has to move."""


class Seen(list):
    """[(seconds since start, text)] of what appeared on a terminal.

    `late`: seconds by which this process, which only waits, was woken too late. On a machine that busy nothing moves.
    """

    late = 0.0

    @property
    def silence(self):
        """The longest time in which nothing appeared, without what is the machine's."""
        times = [at for at, _ in self]
        return max(b - a for a, b in itertools.pairwise(times)) - self.late

    @property
    def text(self):
        return "".join(part for _, part in self)

    @property
    def plain(self):
        """The text without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)


def on_terminal(code, **variables):
    """Runs Python on a pseudo-terminal of 24 x 100; what appears, and the exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TERM": "xterm-256color", "COLUMNS": "100", **variables}
    if "NO_COLOR" not in variables:
        environment.pop("NO_COLOR", None)
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = Seen()
    while True:
        asked = time.monotonic()
        ready, _, _ = select.select([ours], [], [], 0.1)
        seen.late = max(seen.late, time.monotonic() - asked - 0.1)
        if not ready:
            assert asked - began < 200
            continue
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        seen.append((time.monotonic() - began, data.decode(errors="replace")))
    os.close(ours)
    return seen, child.wait()


SLOW = """
import time
from search.console.progress import Reporter
with Reporter() as reporter:
    reporter.doing("loading the teacher")
    time.sleep(3)
    with reporter.phase("block library", 10) as bar:
        time.sleep(3)  # the first step
        bar.update(1)
        time.sleep(2.5)
    reporter.info("a line")
    time.sleep(2.5)
"""


def test_something_moves_though_nothing_is_reported():
    seen, code = on_terminal(SLOW)
    assert code == 0
    assert seen.silence < SILENCE
    assert "loading the teacher  0:02" in seen.plain
    assert re.search(r"measure every block alone .*0/10 +0:02", seen.plain)
    assert " left" not in seen.plain  # one report is no evidence
    lines = seen.plain.replace("\r", "\n").split("\n")
    assert "a line" in lines
    assert any(re.fullmatch(r"measure every block alone: 1/10, [5-9]\.\d s", line) for line in lines)
    assert seen.text.endswith("\x1b[2K")  # what moved is gone


def test_a_busy_interpreter_leaves_room_to_draw():
    """Python code that never sleeps, as in tokenizing or sorting."""
    busy = SLOW.replace("time.sleep(3)\n", "end = time.monotonic() + 3\n    while time.monotonic() < end: pass\n", 1)
    seen, code = on_terminal(busy)
    assert code == 0
    assert seen.silence < SILENCE


def test_drawing_costs_little():
    """At most 2 % of one processor, and at most twice a second."""
    code = """
import os, sys, time
from search.console.progress import Reporter
with Reporter() as reporter, reporter.phase("a", 100) as bar:
    bar.update(1, "loss 0.5")
    before, began = time.process_time(), time.monotonic()
    time.sleep(4)
    used = (time.process_time() - before) / (time.monotonic() - began)
print(f"used {used:.4f}")
"""
    seen, _ = on_terminal(code)
    assert float(re.search(r"used ([\d.]+)", seen.plain)[1]) < 0.02
    assert len(re.findall(r"a .*?1/100", seen.plain)) <= 4 * 2 + 3  # at the beginning and the end, too


def test_no_color_on_a_terminal():
    seen, _ = on_terminal(SLOW.replace("3", "0.6").replace("2.5", "0.1"), NO_COLOR="1")
    assert "loading the teacher" in seen.plain
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38;[0-9;]+)m", seen.text)


def test_what_is_no_terminal_sees_lines_alone():
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    code = SLOW.replace("3", "0.6").replace("2.5", "0.1")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"measure every block alone: 1/10, 0\.[6-9] s\na line\n", done.stdout)
    assert done.stderr == ""


def test_a_command_moves_while_its_libraries_load(tmp_path):
    """From the first second to the end, over seconds of imports; what is redirected stays where it was sent."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    (tmp_path / "model" / "config.json").write_text(
        '{"architectures": ["BertForSequenceClassification"], "model_type": "bert"}'
    )
    code = f"import sys; from search.cli import main; sys.exit(main(['predict', '{tmp_path}/model', 'a text']))"
    seen, status = on_terminal(code)
    assert status == 2
    assert "loading the model  0:0" in seen.plain
    assert "cannot be loaded" in seen.plain
    assert seen.silence < SILENCE


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def steps(self, pace, done, seconds, total):
        for count in done:
            self.now += seconds
            pace.take(count, total)


def test_estimates_wait_for_evidence():
    clock = Clock()
    pace = Pace(100, now=clock)
    clock.steps(pace, [1], 30, 100)  # a first unit that takes thirty times as long
    clock.steps(pace, [2, 3], 1, 100)
    assert pace.left is None  # two reports behind the first
    clock.steps(pace, [4], 1, 100)
    assert pace.left == pytest.approx(96)  # a second each; the first one does not count
    clock.now += 10
    assert pace.left == pytest.approx(86)  # ticks between reports
    clock.steps(pace, [100], 86, 100)
    assert pace.left is None
    quick = Pace(1000, now=clock)
    clock.steps(quick, range(1, 20), 0.01, 1000)
    assert quick.left is None  # a fifth of a second is no evidence
    begun = Pace(100000, now=clock)
    clock.steps(begun, range(1, 20), 1, 100000)
    assert begun.left is None  # nor is a share of 0.02 %


def test_a_resumed_phase_counts_from_where_it_goes_on():
    clock = Clock()
    pace = Pace(100, now=clock)
    clock.steps(pace, [50, 51, 52, 53, 54], 2, 100)
    assert pace.left == pytest.approx(46 * 2)
    assert pace.rate == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [range(20, 0, -1), range(1, 21)], ids=["shrinking", "growing"])
def test_units_of_known_cost_are_weighted(shape):
    """Each unit takes a second per unit of cost: the estimate is right from the first one on, the unweighted is not."""
    costs = [float(c) for c in shape]
    clock = Clock()
    weighted, plain = Pace(len(costs), costs, now=clock), Pace(len(costs), now=clock)
    errors = []
    for done, cost in enumerate(costs[:-1], start=1):
        clock.now += cost
        weighted.take(done, len(costs))
        plain.take(done, len(costs))
        if weighted.left is not None:
            assert weighted.left == pytest.approx(sum(costs[done:]))
            errors.append(abs((plain.left or 0) - sum(costs[done:])) / sum(costs[done:]))
    assert len(errors) > 10
    assert max(errors) > 0.5


def test_costs_of_the_last_round_follow_who_is_left():
    """A toy of equal halves: 4 + 2 students of half the teacher's layers, halved at each of two rungs."""
    from types import SimpleNamespace

    variants = SimpleNamespace(encoder=lambda arch: {"whole": 10, "half": 5}[arch], whole="whole")
    entrants = [SimpleNamespace(group=g, architecture="half") for g in "aaaabb"]
    costs = _costs(variants, entrants, 9, rungs_of(9, 2))
    assert costs == [1 + 1.5 * 6] * 3 + [1 + 1.5 * 3] * 3 + [1 + 1.5 * 2] * 3


def test_words():
    assert [in_words(s) for s in (7.9, 750, 10930)] == ["0:07", "12:30", "3:02:10"]
