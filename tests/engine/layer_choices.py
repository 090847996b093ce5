"""Architectures of three layers with fewer heads, without FFN, and left out, and a supernet that stores them all."""

from __future__ import annotations

from fractions import Fraction

import pytest
from encoder_reference import TRUNCATE, randomize

from engine.architecture.architecture import SKIP, Architecture, LayerSpec
from engine.student import FFNASConfig, FFNASForSequenceClassification
from kernels.language.expression import parse_expression

HEADS, SIZE, INNER = 5, 7, 40
GELU, TANH = TRUNCATE[0], TRUNCATE[1]


def spec(stack, ratio=1, heads=None, text=GELU):
    return LayerSpec(parse_expression(text), stack, Fraction(ratio), heads)


THREE_OF_FIVE = Architecture((spec(1, "3/8", 3), spec(2, 1, 3, TANH), spec(1, "1/2", 5)))
CHOICES = {
    "three of five heads": THREE_OF_FIVE,
    "one head, 3/8 of the neurons": Architecture((spec(2, "3/8", 1),) * 3),
    "first layer left out": Architecture((SKIP, spec(2), spec(1, "5/8", 4))),
    "last layer left out": Architecture((spec(2), spec(1, "5/8", 4), SKIP)),
    "only the middle": Architecture((SKIP, spec(1, "3/8", 2), SKIP)),
    "no FFN": Architecture((spec(0), spec(1), spec(0, heads=3))),
    "no attention": Architecture((spec(1, heads=0), spec(2, "1/3", 0, TANH), spec(2))),
    "no attention at last": Architecture((spec(0, heads=2), spec(2), spec(2, "3/8", 0))),
    "one block of each": Architecture((spec(0, heads=4), SKIP, spec(1, "1/40", 0))),
}
each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


def config(**changes) -> FFNASConfig:
    values = {
        "vocab_size": 53,
        "hidden_size": HEADS * SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": HEADS,
        "intermediate_size": INNER,
        "embedding_type": "full",
        "max_position_embeddings": 24,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layers": Architecture((spec(2),) * 3),
    }
    return FFNASConfig(**values | changes)


def supernet(cls=FFNASForSequenceClassification, **changes):
    return randomize(cls(config(**changes))).eval()
