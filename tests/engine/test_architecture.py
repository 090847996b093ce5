"""Architectures as text and as files; files are read as hostile."""

from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.architecture.architecture import Architecture, LayerSpec, parse_ratio, parse_unit_ratio, uniform
from engine.architecture.file import architecture_from_dict, architecture_to_dict, load_architecture, save_architecture
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression

RELEASED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)), "
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), "
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)
SHAPE = ModelShape(540, 6, 540, teacher_hidden_size=768)


@pytest.fixture
def released():
    return Architecture.parse(RELEASED)


def test_text_round_trips(released):
    assert str(released) == RELEASED
    assert ", ".join(released.texts()) == RELEASED
    assert len(released) == 6
    assert released.layers[5] == LayerSpec(parse_expression("leaky_relu(linear(gelu(linear(x,wb1)),wb2))"), 2, "1/3")


def test_value_semantics(released):
    again = Architecture.parse(RELEASED)
    assert released == again
    assert len({released, again}) == 1
    assert pickle.loads(pickle.dumps(released)) == released
    assert copy.deepcopy(released) == released
    with pytest.raises(AttributeError):
        released.layers = ()


def test_file_content_is_the_documented_one(released):
    data = architecture_to_dict(released, SHAPE)
    assert data == json.loads(json.dumps(data))
    assert {k: data[k] for k in ("format", "hidden_size", "num_layers", "params")} == {
        "format": 1, "hidden_size": 540, "num_layers": 6, "params": 15_737_724,
    }  # fmt: skip
    assert data["layers"][0] == {
        "expression": "tanh(linear(gelu(linear(x,wb1)),wb2))", "stack": 4, "ratio": [1, 2],
    }  # fmt: skip
    assert architecture_to_dict(released, SHAPE, fit_dense=False)["params"] == 15_737_724 - 768 * 541


def test_file_round_trips(released, tmp_path):
    path = tmp_path / "best" / "architecture.json"
    save_architecture(released, path, SHAPE)
    assert load_architecture(path) == released
    assert load_architecture(str(path), shape=SHAPE) == released


def test_file_must_fit_the_model_it_is_loaded_for(released, tmp_path):
    save_architecture(released, tmp_path / "a.json", SHAPE)
    with pytest.raises(UserError, match=r"a\.json: hidden_size, num_layers: the file has 540, 6, the model 360, 6"):
        load_architecture(tmp_path / "a.json", shape=ModelShape(360, 6, 360))


def test_key_joins_equal_functions():
    def make(text):
        return Architecture.parse(text)

    a = make("linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)")
    assert a.key() == make("linear1_2(relu(mul(x,linear1_2(x,wb1))),wb2)").key()
    assert a.key() != make("linear1_3(relu(mul(x,linear1_3(x,wb1))),wb2)").key()
    assert a.key() != make("linear2_2(relu(mul(x,linear2_2(x,wb1))),wb2)").key()
    assert a.key() != a.key("pad")
    nested, plain = "linear1_1(relu(relu(linear1_1(x,wb1))),wb2)", "linear1_1(relu(linear1_1(x,wb1)),wb2)"
    assert make(nested).key() == make(plain).key()


def test_uniform():
    arch = uniform(GELU_FFN, 4, Fraction(1, 2), 3)
    assert arch.texts() == ["linear4_2(gelu(linear4_2(x,wb1)),wb2)"] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear(gelu(linear(x,wb1)),wb2)", "layer 0 has no stack and ratio"),
        ("linear1_1(gelu(linear1_1(x,wb1)),wb2), x", "layer 1 has no stack and ratio"),
        ("linear1_1(gelu(linear1_1(x,wb2)),wb1)", "layers\\[0\\].expression: wb2 stands before wb1"),
        ("linear1_1(gelu(x),wb1)", "wb2 occurs 0 times"),
        ("linear65_1(gelu(linear65_1(x,wb1)),wb2)", "layers\\[0\\].stack: must be an integer from 0 to 64"),
        ("linear1_65(gelu(linear1_65(x,wb1)),wb2)", "layers\\[0\\].ratio: must be p/q"),
        ("foo(x)", "unknown operator 'foo'"),
        ("", "found the end"),
    ],
)
def test_wrong_text_is_one_clear_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        Architecture.parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "k"), [(1, 1), (1.0, 1), (0.5, 2), (0.333, 3), (0.25, 4), ("1/3", 3), ("0.5", 2), (" 1 / 4 ", 4),
                     ("1", 1), ([1, 2], 2), ((2, 4), 2), (Fraction(1, 64), 64)],
)  # fmt: skip
def test_ratios_are_read_in_every_form(value, k):
    assert parse_ratio(value) == parse_unit_ratio(value) == Fraction(1, k)


@pytest.mark.parametrize("value", [0.375, "3/8", [3, 8], (6, 16), Fraction(3, 8), "0.375", 0.3747])
def test_ratios_other_than_1_over_k_are_for_layers_not_for_spaces(value):
    assert parse_ratio(value) == Fraction(3, 8)
    with pytest.raises(UserError, match="ratio: must be 1/k"):
        parse_unit_ratio(value)


@pytest.mark.parametrize(
    "value",
    [0, 2, -1, True, None, 0.33, 1.5, float("nan"), float("inf"), "", "a", "1/0", "3/2", "1/2/3", "1/65", "²/4", "-1/2",
     [1], [1, 0], [1, 2, 3], [1.0, 2], [True, 2], [-1, -2], [9, 8], {"p": 1}, Fraction(2, 65), "9" * 40, 10**50],
)  # fmt: skip
def test_other_ratios_are_refused(value):
    with pytest.raises(UserError, match="ratio: must be 1/k"):
        parse_unit_ratio(value)
    with pytest.raises(UserError, match="ratio: must be p/q"):
        parse_ratio(value)


def valid_file():
    return architecture_to_dict(Architecture.parse(RELEASED), SHAPE)


def edited(path, value):
    data = valid_file()
    target = data
    for step in path[:-1]:
        target = target[step]
    if value is KeyError:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], 3, "format: 3 is not known"),
        (["layers", 2, "ratio"], [3, 8], r"layers\[2\]\.ratio: must be 1/k"),
        (["layers", 2, "heads"], 3, r"layers\[2\]: unknown field 'heads'"),
        (["format"], True, "format: must be an integer"),
        (["format"], KeyError, "field format is missing"),
        (["extra"], 1, "unknown field 'extra'"),
        (["hidden_size"], 0, "hidden_size: must be an integer"),
        (["hidden_size"], True, "hidden_size: must be an integer"),
        (["hidden_size"], 540.0, "hidden_size: must be an integer.*got 540"),
        (["hidden_size"], 10**4000, "hidden_size: .* a huge integer"),
        (["num_layers"], 5, "layers: holds 6 entries, but num_layers is 5"),
        (["num_layers"], "6", "num_layers: must be an integer"),
        (["num_layers"], 10**9, "num_layers: must be an integer from 1 to 256"),
        (["params"], -1, "params: must be an integer"),
        (["params"], None, "params: must be an integer"),
        (["layers"], {}, "layers: must be a list, got an object"),
        (["layers"], None, "layers: must be a list"),
        (["layers"], [], "layers: holds 0 entries"),
        (["layers", 2], [], r"layers\[2\]: must be an object"),
        (["layers", 2, "stack"], KeyError, r"layers\[2\]: field stack is missing"),
        (["layers", 2, "bias"], 1, r"layers\[2\]: unknown field 'bias'"),
        (["layers", 2, "stack"], 0, r"layers\[2\]\.stack: must be an integer from 1 to 64"),
        (["layers", 2, "stack"], True, r"layers\[2\]\.stack: must be"),
        (["layers", 2, "stack"], 1.0, r"layers\[2\]\.stack: must be"),
        (["layers", 2, "ratio"], "1/2", r"layers\[2\]\.ratio: must be a list of two integers"),
        (["layers", 2, "ratio"], [1], r"layers\[2\]\.ratio: must be 1/k"),
        (["layers", 2, "ratio"], [1, 0], r"layers\[2\]\.ratio: must be 1/k"),
        (["layers", 2, "ratio"], [1, 10**4000], r"layers\[2\]\.ratio: must be 1/k"),
        (["layers", 2, "ratio"], [True, 2], r"layers\[2\]\.ratio: must be 1/k"),
        (["layers", 2, "expression"], 7, r"layers\[2\]\.expression: must be text"),
        (["layers", 2, "expression"], "exec(x)", r"layers\[2\]\.expression: unknown operator 'exec'"),
        (["layers", 2, "expression"], "x", r"layers\[2\]\.expression: wb1 occurs 0 times"),
        (["layers", 2, "expression"], "gelu(" * 9999, r"layers\[2\]\.expression: .*deeper"),
        (["layers", 2, "expression"], "x" * 10**6, r"layers\[2\]\.expression: .*longer"),
    ],
)
def test_each_wrong_field_is_named(path, value, message):
    with pytest.raises(UserError, match=message) as error:
        architecture_from_dict(edited(path, value))
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an architecture file"),
        (b"{", "is not an architecture file"),
        (b"[]", "architecture: must be an object"),
        (b"null", "architecture: must be an object"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"format": 1, "format": 2}', "field 'format' is given twice"),
        (b'{"format": NaN}', "NaN is not a number JSON knows"),
        (b'{"format": 1e999}', "field hidden_size is missing"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not an architecture file"),
        (b" " * (1 << 22) + b"{}", "larger than"),
    ],
    ids=range(11),
)
def test_hostile_files(content, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_architecture(path)
    assert "a.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            load_architecture(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.sampled_from([["format"], ["hidden_size"], ["num_layers"], ["layers"], ["params"], ["layers", 0],
                     *(["layers", 1, f] for f in ("stack", "ratio", "expression"))]),
    json_values,
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_value_anywhere_is_read_or_refused_in_one_line(path, value):
    message = ""
    try:
        assert len(architecture_from_dict(edited(path, value))) == 6
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_specs_check_their_types():
    with pytest.raises(UserError, match="expression: must be an Expression, got str"):
        LayerSpec("x", 1, 1)
    with pytest.raises(UserError, match=r"layers\[0\]: must be a LayerSpec"):
        Architecture(("x",))
    with pytest.raises(UserError, match="1 to 256 layers, got 0"):
        Architecture(())
