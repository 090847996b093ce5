"""FLOPs by formula agree with a counter that watches the matrix products of the plain forward pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_reference import batch, encode, parameters, random_architecture, small_config, small_shape
from torch.utils.flop_counter import FlopCounterMode

from engine.architecture.flops import count_flops
from engine.architecture.shape import inner_width
from engine.errors import UserError
from engine.student import FFNASModel


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("length", [1, 7])
def test_the_formula_equals_a_count_of_the_plain_forward_pass(seed, length):
    architecture = random_architecture(np.random.default_rng(seed))
    config = small_config(layers=architecture)
    model = FFNASModel(config)
    ids, _, types = batch(seed, rows=2, length=8)
    ids, types = ids[:, :length], types[:, :length]
    layers = [(str(s.expression), s.stack, inner_width(s.ratio, 13)) for s in architecture.layers]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encode(parameters(model), config, layers, ids, torch.ones_like(ids, dtype=torch.bool), types)
    assert 2 * count_flops(architecture, small_shape(), length) == counter.get_total_flops()


def test_the_projection_is_counted_when_asked_for():
    architecture = random_architecture(np.random.default_rng(0))
    plain, projected = (count_flops(architecture, small_shape(), 5, fit_dense=f) for f in (False, True))
    assert projected - plain == 2 * 5 * 15 * 11


def test_wrong_sizes_are_refused():
    architecture = random_architecture(np.random.default_rng(0))
    with pytest.raises(UserError, match="layers: the architecture has 3"):
        count_flops(architecture, small_shape(num_layers=2))
    with pytest.raises(UserError, match="length"):
        count_flops(architecture, small_shape(), 0)
