"""A short round of the fuzzer for every reader of hostile input, and the properties hypothesis looks for itself."""

import contextlib
import os
import string
import time

import fuzz
import pytest
import torch
from corrupt_programs import attack
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.architecture.file import architecture_from_dict
from engine.errors import UserError
from kernels.language.expression import ExpressionError, parse_layers
from search.config.options import parse

SHORT = {"parser": 3000, "architecture": 400, "ledger": 25, "checkpoint": 60}
LONG = {"parser": 200_000, "architecture": 20_000, "ledger": 600, "checkpoint": 2000, "config": 300, "data": 300}


@pytest.mark.parametrize("name", SHORT)
def test_hostile_input_is_refused_in_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert fuzz.fuzz(fuzz.TARGETS[name](tmp_path), SHORT[name], seed=7) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LONG)
def test_hostile_input_is_refused_in_one_line_long(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert fuzz.fuzz(fuzz.TARGETS[name](tmp_path), LONG[name], seed=11) == []


def test_a_reader_that_crashes_hangs_or_runs_code_is_noticed(tmp_path, monkeypatch):
    """The fuzzer itself: every kind of failure it is to find."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "LIMIT", 0.05)

    def run(data):
        if data == b"crash":
            raise KeyError("x")
        if data == b"hang":
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
        if data == b"run":
            open("CANARY", "w").close()
        if data == b"lines":
            raise UserError("one") if not os.path.exists("x") else None

    target = fuzz.Target(run, (UserError,), [b"ok", b"crash", b"hang", b"run"], [b"?"], ("nothing.py",))
    found = " | ".join(fuzz.fuzz(target, 4, seed=0))
    for sign in ("KeyError", "0.1 s for", "ran code"):
        assert sign in found


@given(st.text(alphabet=string.printable + "\u0661\u2028é\x00", max_size=300))
@settings(max_examples=300, deadline=2000)
def test_any_text_is_an_expression_or_an_error_of_one_line(text):
    try:
        layers = parse_layers(text)
    except ExpressionError:
        return
    assert parse_layers(", ".join(map(str, layers))) == layers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["format", "hidden_size", "num_layers", "layers", "params"])
LAYER = st.fixed_dictionaries({"expression": JSON, "stack": JSON, "ratio": JSON})


@given(st.dictionaries(FIELDS, JSON | st.lists(LAYER, max_size=3) | st.just(1), max_size=5) | JSON)
@settings(max_examples=300, deadline=2000)
def test_any_json_value_is_an_architecture_or_an_error(data):
    with contextlib.suppress(UserError):
        architecture_from_dict(data)


@pytest.mark.parametrize(
    "text",
    [
        "tanh(" * 100_000 + "x",
        "tanh(" * 10_000 + "x" + ")" * 10_000,
        "add(x," * 30_000,
        "x" * 10_000_000,
        "linear(" + "9" * 1_000_000 + ")",
        "," * 1_000_000,
        "((((((((((" * 100_000,
    ],
    ids=["deep", "deep in few characters", "deep binary", "10 MB name", "huge number", "commas", "10 MB brackets"],
)
def test_size_costs_neither_time_nor_memory(text):
    began = time.process_time()
    with pytest.raises(ExpressionError) as caught:
        parse_layers(text)
    assert time.process_time() - began < 1.0
    assert len(str(caught.value)) < 600


def test_a_yaml_bomb_and_code_in_yaml_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = fuzz.config_target(tmp_path)
    for number, content in enumerate(c for c in target.corpus if c.startswith((b"a: &a", b"!!", b"seed: !!"))):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(content)
        began = time.process_time()
        with pytest.raises(UserError):
            parse(["--config", str(path)])
        assert time.process_time() - began < 20
    assert not (tmp_path / "CANARY").exists()


def test_corrupted_programs_never_reach_a_kernel():
    """In this process: a crash would end the test run. Under sanitizers: `make sanitize`."""
    torch.set_num_threads(1)
    counts = attack(300, seed=3)
    assert counts["refused by validation"] > 200
