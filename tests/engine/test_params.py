"""Parameter counts: the published numbers, and an independent count over real modules."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from engine.architecture.architecture import Architecture, uniform
from engine.architecture.params import count_parameters, count_shapes, ffn_parameters, fixed_parameters
from engine.architecture.shape import ModelShape, inner_width
from engine.errors import UserError
from kernels.language.expression import GELU_FFN

RELEASED = Architecture.parse(
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)),"
    " sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2),"
    " linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)
TWICE = Architecture(tuple(layer for layer in RELEASED.layers for _ in range(2)))


@pytest.mark.parametrize(
    ("arch", "shape", "count"),
    [
        (RELEASED, ModelShape(540, 6, 540, teacher_hidden_size=768), 15_737_724),
        (RELEASED, ModelShape(360, 6, 360, teacher_hidden_size=768), 9_375_144),
        (TWICE, ModelShape(360, 12, 360, teacher_hidden_size=768), 14_241_864),
        (RELEASED, ModelShape(768, 6, 3072, embedding_size=None, teacher_hidden_size=768), 70_116_608),
    ],
    ids=["EfficientBERT", "EfficientBERT-TINY", "EfficientBERT++", "TinyBERT-6"],
)
def test_published_counts(arch, shape, count):
    assert count_parameters(arch, shape) == count
    without = count_parameters(arch, shape, fit_dense=False)
    assert count - without == 768 * (shape.hidden_size + 1)


def modules(shape: ModelShape, layers: list[tuple[int, int]]) -> torch.nn.ModuleList:
    """A student's parameters as plain modules, on the meta device; `layers` are (stack, inner width)."""
    h, nn = shape.hidden_size, torch.nn
    with torch.device("meta"):
        found = [nn.Embedding(shape.type_vocab, h), nn.Embedding(shape.max_positions, h), nn.LayerNorm(h)]
        if shape.embedding_size is None:
            found.append(nn.Embedding(shape.vocab_size, h))
        else:
            found += [nn.Embedding(shape.vocab_size, shape.embedding_size), nn.Linear(3 * shape.embedding_size, h)]
        for stack, inner in layers:
            found += [nn.Linear(h, h) for _ in range(4)] + [nn.LayerNorm(h)]
            for _ in range(stack):
                found += [nn.Linear(h, inner), nn.Linear(inner, h), nn.LayerNorm(h)]
        if shape.teacher_hidden_size is not None:
            found.append(nn.Linear(h, shape.teacher_hidden_size))
    return nn.ModuleList(found)


@pytest.mark.parametrize("embedding", [None, 1, 64])
@pytest.mark.parametrize("teacher", [None, 45])
@pytest.mark.parametrize(("hidden", "ffn"), [(1, 4), (45, 45), (270, 541)])
def test_formula_against_modules(hidden, ffn, teacher, embedding):
    shape = ModelShape(hidden, 3, ffn, 999, embedding, 77, 3, teacher)
    shapes = [(1, Fraction(1)), (4, Fraction(1, 2)), (2, Fraction(1, 3))]
    expected = sum(p.numel() for p in modules(shape, [(n, int(r * ffn)) for n, r in shapes]).parameters())
    assert count_shapes(shapes, shape) == expected
    fixed = fixed_parameters(shape)
    assert fixed + sum(ffn_parameters(hidden, inner_width(r, ffn), n) for n, r in shapes) == expected


@pytest.mark.parametrize(("k", "ffn", "width"), [(3, 541, 180), (3, 540, 180), (4, 541, 135), (1, 7, 7), (7, 7, 1)])
def test_inner_width_is_rounded_down_exactly(k, ffn, width):
    assert inner_width(Fraction(1, k), ffn) == width


def test_inner_width_of_zero_is_refused():
    with pytest.raises(UserError, match="ratio: 1/4 of ffn_size 3 leaves an inner width of 0"):
        inner_width(Fraction(1, 4), 3)


def test_number_of_layers_must_agree():
    with pytest.raises(UserError, match="the architecture has 2, the model 6"):
        count_parameters(uniform(GELU_FFN, 1, Fraction(1), 2), ModelShape(540, 6, 540))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 0), ("num_layers", True), ("ffn_size", 3.0), ("vocab_size", "30522"), ("embedding_size", -1),
     ("max_positions", None), ("teacher_hidden_size", 1 << 60)],
)  # fmt: skip
def test_sizes_are_checked_by_name(field, value):
    sizes = {"hidden_size": 540, "num_layers": 6, "ffn_size": 540, field: value}
    with pytest.raises(UserError, match=f"{field}: must be an integer"):
        ModelShape(**sizes)
