"""Philox4x32-10 against the published known answers and an integer implementation, and the dropout mask on top."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.reference.philox import dropout, dropout_mask, philox4x32, random_words

KNOWN_ANSWERS = [  # Random123 distribution, kat_vectors, philox4x32 with 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_python(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, words):
    seed = key[0] | key[1] << 32
    result = philox4x32(*(torch.tensor([c]) for c in counter), seed)
    assert tuple(int(w) for w in result) == words == philox_in_python(counter, key)


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 45])
def test_layout_is_the_documented_one(columns):
    seed, stream = 0x1234_5678_9ABC_DEF0, 3
    words = random_words(5, columns, seed, stream=stream)
    for row in range(5):
        for column in range(columns):
            group = philox_in_python((column // 4, row, 0, stream), (seed & 0xFFFFFFFF, seed >> 32))
            assert int(words[row, column]) == group[column % 4]


def test_mask_does_not_depend_on_the_leading_shape_or_on_other_rows():
    whole = dropout_mask((600, 45), 0.3, 11)
    assert torch.equal(dropout_mask((20, 30, 45), 0.3, 11).reshape(600, 45), whole)
    assert torch.equal(dropout_mask((7, 45), 0.3, 11), whole[:7])


def test_mask_across_blocks_of_rows():
    """More rows than are worked on at once give the same mask as the words themselves."""
    rows, columns, p = 40_001, 5, 0.25
    kept = dropout_mask((rows, columns), p, 1)
    last = philox_in_python((1, rows - 1, 0, 0), (1, 0))[0]
    assert bool(kept[-1, 4]) == (last >= round(p * 2**32))
    assert torch.equal(kept, random_words(rows, columns, 1) >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p):
    kept = dropout_mask((1000, 540), p, 7)
    # 540,000 independent draws: five standard deviations.
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())


def test_seeds_and_streams_are_independent():
    first, second = dropout_mask((500, 64), 0.5, 1), dropout_mask((500, 64), 0.5, 2)
    third = dropout_mask((500, 64), 0.5, 1, stream=1)
    for other in (second, third):  # 32,000 fair coins agree half of the time, five standard deviations
        assert abs((first == other).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(first.numel())
    assert not torch.equal(dropout_mask((9, 9), 0.5, 1 + 2**32), dropout_mask((9, 9), 0.5, 1))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1,), (1, 1), (2, 3, 1)])
def test_odd_shapes(shape):
    assert dropout_mask(shape, 0.5, 0).shape == shape


def test_dropout_scales_what_it_keeps():
    value = torch.randn(6, 45, dtype=torch.float64, requires_grad=True)
    kept = dropout_mask(value.shape, 0.2, 5)
    result = dropout(value, 0.2, 5)
    assert torch.allclose(result, kept * value / 0.8, rtol=1e-15, atol=0)  # one rounding of the scale
    result.sum().backward()
    assert torch.allclose(value.grad, kept.double() / 0.8, rtol=1e-15, atol=0)


def test_dropout_at_the_ends():
    value = torch.tensor([[1.0, math.inf, math.nan]])
    assert dropout(value, 0.0, 1) is value
    assert torch.equal(dropout(value, 1.0, 1), torch.zeros(1, 3))
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="p_drop must lie in"):
            dropout(value, p, 1)
