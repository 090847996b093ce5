"""Layers with fewer heads, without FFN, left out, or of other ratios than 1/k: values, text, file and formulas."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from engine.architecture.architecture import SKIP, Architecture, LayerSpec
from engine.architecture.file import architecture_from_dict, architecture_to_dict, load_architecture, save_architecture
from engine.architecture.flops import count_flops
from engine.architecture.memory import peak_activation_bytes
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.errors import UserError
from kernels.language.expression import GELU_FFN, parse_expression

TANH = parse_expression("tanh(linear(gelu(linear(x,wb1)),wb2))")
SHAPE = ModelShape(35, 5, 40, vocab_size=99, embedding_size=None, max_positions=17, num_heads=5)
MIXED = Architecture(
    (
        SKIP,
        LayerSpec(TANH, 2, Fraction(3, 8), 3),
        LayerSpec(GELU_FFN, 0, Fraction(1)),
        LayerSpec(GELU_FFN, 1, Fraction(1, 2), 0),
        LayerSpec(GELU_FFN, 0, Fraction(1), 4),
    )
)
TEXT = (
    "none@0, tanh(linear2_3/8(gelu(linear2_3/8(x,wb1)),wb2))@3, none, linear1_2(gelu(linear1_2(x,wb1)),wb2)@0, none@4"
)


def test_text_round_trips():
    assert str(MIXED) == TEXT
    assert Architecture.parse(TEXT) == MIXED


def test_without_ffn_expression_and_ratio_say_nothing():
    assert LayerSpec(TANH, 0, Fraction(1, 3), 2) == LayerSpec(GELU_FFN, 0, Fraction(1), 2)
    assert [layer.skipped for layer in MIXED.layers] == [True, False, False, False, False]
    assert replace(SKIP, heads=None) != SKIP


def test_key_covers_heads_ratios_and_missing_ffns():
    keys = [Architecture.parse(text).key() for text in ("none", "none@0", "none@1")]
    ffn = "linear1_{0}(gelu(linear1_{0}(x,wb1)),wb2)"
    keys += [Architecture.parse(ffn.format(r) + h).key() for r in ("2", "3/8", "8") for h in ("", "@0", "@2")]
    assert len(set(keys)) == len(keys)
    assert Architecture.parse(ffn.format("2") + "@2").key() == Architecture.parse(ffn.format("2/4") + "@02").key()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": -1}, "heads: must be an integer from 0"),
        ({"heads": True}, "heads: must be an integer"),
        ({"heads": 2.0}, "heads: must be an integer"),
        ({"stack": -1}, "stack: must be an integer from 0 to 64"),
        ({"ratio": Fraction(9, 8)}, "ratio: must be p/q"),
    ],
)
def test_fields_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        replace(LayerSpec(GELU_FFN, 1, Fraction(1)), **change)


def test_file_is_format_2_only_where_it_must_be(tmp_path):
    data = architecture_to_dict(MIXED, SHAPE)
    assert data["format"] == 2
    assert data["layers"][1] == {
        "expression": "tanh(linear(gelu(linear(x,wb1)),wb2))", "stack": 2, "ratio": [3, 8], "heads": 3,
    }  # fmt: skip
    assert "heads" not in data["layers"][2]
    save_architecture(MIXED, tmp_path / "a.json", SHAPE)
    assert load_architecture(tmp_path / "a.json", shape=SHAPE) == MIXED
    plain = LayerSpec(GELU_FFN, 1, Fraction(1, 3))
    for layer, version in (
        (plain, 1),
        (replace(plain, heads=5), 2),
        (replace(plain, stack=0), 2),
        (replace(plain, ratio="2/3"), 2),
    ):
        made = Architecture((plain, layer))
        data = architecture_to_dict(made, replace(SHAPE, num_layers=2))
        assert data["format"] == version
        assert architecture_from_dict(data) == made


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", -1, r"layers\[1\]\.heads: must be an integer"),
        ("heads", "3", r"layers\[1\]\.heads: must be an integer"),
        ("heads", 10**4000, r"layers\[1\]\.heads: .* a huge integer"),
        ("stack", -1, r"layers\[1\]\.stack: must be an integer from 0"),
        ("ratio", [8, 3], r"layers\[1\]\.ratio: must be p/q"),
        ("expression", "none", r"layers\[1\]\.expression: expected an expression"),
        ("tail", 1, r"layers\[1\]: unknown field 'tail'; known fields are expression, stack, ratio, heads"),
    ],
)
def test_wrong_fields_of_a_file_are_named(field, value, message):
    data = architecture_to_dict(MIXED, SHAPE)
    data["layers"][1][field] = value
    with pytest.raises(UserError, match=message):
        architecture_from_dict(data)


def modules(shape: ModelShape, architecture: Architecture) -> torch.nn.ModuleList:
    """The parameters of a student as plain modules, on the meta device."""
    nn, hidden = torch.nn, shape.hidden_size
    with torch.device("meta"):
        found = [nn.Embedding(shape.type_vocab, hidden), nn.Embedding(shape.max_positions, hidden)]
        found.append(nn.LayerNorm(hidden))
        if shape.embedding_size is None:
            found.append(nn.Embedding(shape.vocab_size, hidden))
        else:
            tokens = 3 if shape.trigram else 1
            found.append(nn.Embedding(shape.vocab_size, shape.embedding_size))
            found.append(nn.Linear(tokens * shape.embedding_size, hidden))
        for layer in architecture.layers:
            width = hidden if layer.heads is None else layer.heads * (hidden // shape.num_heads)
            if width:
                found += [nn.Linear(hidden, width) for _ in range(3)] + [nn.Linear(width, hidden), nn.LayerNorm(hidden)]
            for _ in range(layer.stack):
                inner = int(layer.ratio * shape.ffn_size)
                found += [nn.Linear(hidden, inner), nn.Linear(inner, hidden), nn.LayerNorm(hidden)]
    return nn.ModuleList(found)


@pytest.mark.parametrize(("embedding", "trigram"), [(None, True), (11, True), (11, False)])
@pytest.mark.parametrize("architecture", [MIXED, Architecture((SKIP,) * 5)], ids=["mixed", "nothing"])
def test_parameters_against_modules(architecture, embedding, trigram):
    shape = replace(SHAPE, embedding_size=embedding, trigram=trigram)
    expected = sum(p.numel() for p in modules(shape, architecture).parameters())
    assert count_parameters(architecture, shape) == expected


@pytest.mark.parametrize(("embedding", "trigram"), [(None, True), (11, True), (11, False)])
def test_flops_against_matrix_products(embedding, trigram):
    shape, length = replace(SHAPE, embedding_size=embedding, trigram=trigram), 13
    products = []  # (rows, inner, columns) of every product of one sequence
    if embedding is not None:
        products.append((length, embedding * (3 if trigram else 1), 35))
    for layer in MIXED.layers:
        heads = 5 if layer.heads is None else layer.heads
        products += [(length, 35, 7)] * 3 * heads + [(length, 7, length), (length, length, 7), (length, 7, 35)] * heads
        inner = int(layer.ratio * 40)
        products += [(length, 35, inner), (length, inner, 35)] * layer.stack
    assert count_flops(MIXED, shape, length) == sum(2 * a * b * c for a, b, c in products)


def test_memory_follows_the_widest_layer_that_is_left():
    def elements(*layers, **sizes):
        arch = Architecture(tuple(LayerSpec(GELU_FFN, *layer) for layer in layers))
        shape = replace(SHAPE, num_layers=len(layers), **sizes)
        return peak_activation_bytes(arch, shape, sequence_length=1, bytes_per_element=1)

    none, all_heads = (0, 1, 0), (0, 1, None)
    assert elements(none, all_heads) == 5 * 35
    assert elements(none, (0, 1, 4)) == 35 + 4 * 28
    assert elements(none, (0, 1, 2)) == 3 * 35  # LayerNorm
    assert elements(none, none) == 2 * 35
    assert elements(none, (1, 1, 0)) == 35 + 2 * 40  # both sides of the activation
    assert elements(none, none, embedding_size=11) == 3 * 11 + 35
    assert elements(none, none, embedding_size=40, trigram=False) == 40 + 35


def test_formulas_need_to_know_the_heads():
    for count in (count_parameters, count_flops, peak_activation_bytes):
        with pytest.raises(UserError, match="num_heads: is needed where layers keep some of the attention heads"):
            count(MIXED, replace(SHAPE, num_heads=None))
        with pytest.raises(UserError, match="heads: 4 are more than the model's num_heads 1"):
            count(Architecture(MIXED.layers[:1] + MIXED.layers[4:] * 4), replace(SHAPE, num_heads=1))


def test_sizes_of_heads_and_embedding_are_checked():
    with pytest.raises(UserError, match="num_heads: 4 does not divide hidden_size 35"):
        replace(SHAPE, num_heads=4)
    with pytest.raises(UserError, match="num_heads: must be an integer"):
        replace(SHAPE, num_heads=0)
    with pytest.raises(UserError, match="trigram: must be true or false"):
        replace(SHAPE, trigram=1)
