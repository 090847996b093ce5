"""Products on eight-bit codes beside numpy's integers: every set of kernels, odd sizes, edges of the range, NaN."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.runtime.instruction_sets import INT8
from kernels.runtime.library import code_sums, runs_int8

SIZES = [(1, 1, 1), (7, 3, 5), (33, 64, 32), (40, 65, 33), (100, 384, 100), (31, 541, 135), (17, 1537, 16)]


@pytest.fixture(params=INT8)
def number(request):
    if not runs_int8(INT8[request.param][1]):
        pytest.skip(f"this processor or compiler has no {request.param}")
    return INT8[request.param][1]


def row_codes(x):
    """Codes, scale and zero of each row as csrc/cpu/int8.h defines them, in float32 and int64."""
    low, high = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    width = high - low
    inverse = np.divide(np.float32(255), width, out=np.zeros_like(width), where=width > 0)
    zero = np.rint(-low * inverse).astype(np.int64)
    codes = np.rint(x * inverse[:, None]).astype(np.int64) + zero[:, None]
    return np.clip(codes, 0, 255), width / np.float32(255), zero


def weight_codes(w):
    largest = np.abs(w).max(1)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    return np.rint(w * inverse[:, None]).astype(np.int64)


@pytest.mark.parametrize(("rows", "depth", "outputs"), SIZES)
def test_codes_and_sums_are_numpys(number, rows, depth, outputs):
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(rows, depth)) * rng.uniform(0.01, 90, (rows, 1))).astype(np.float32)
    w = rng.normal(size=(outputs, depth)).astype(np.float32)
    if rows > 3:
        x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])  # no range, no negative and no positive number
        w[1] = 0
    codes, scale, zero = row_codes(x)
    found = code_sums(number, x, w)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)
    np.testing.assert_array_equal(found.zero, zero)
    np.testing.assert_array_equal(found.sums, codes @ weight_codes(w).T)


def test_the_largest_codes_do_not_saturate(number):
    """Sums of pairs of products are past 16 bits here: the byte product of AVX2 would cut them off."""
    x, w = np.full((5, 64), 3.0, np.float32), np.full((3, 64), -2.0, np.float32)
    np.testing.assert_array_equal(code_sums(number, x, w).sums, -255 * 127 * 64)


def test_whole_numbers_stay_what_they_are(number):
    """Rows that reach from 0 to 255 and weights that reach to 127 are their own codes."""
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (9, 70)), rng.integers(-127, 128, (11, 70))
    x[:, 0], w[:, 0] = 255, 127
    found = code_sums(number, x.astype(np.float32), w.astype(np.float32))
    np.testing.assert_array_equal(found.sums, x @ w.T)
    np.testing.assert_array_equal(found.scale, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_show(number, bad):
    """Their row's scale is no number, so that its answers are not either; other rows are as before."""
    x, w = np.random.default_rng(1).normal(size=(4, 37)).astype(np.float32), np.ones((2, 37), np.float32)
    good = code_sums(number, x, w)
    x[2, 17] = bad
    found = code_sums(number, x, w)
    assert not np.isfinite(found.scale[2])
    keep = [0, 1, 3]
    np.testing.assert_array_equal(found.sums[keep], good.sums[keep])
    np.testing.assert_array_equal(found.scale[keep], good.scale[keep])
