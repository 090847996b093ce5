"""Linear layers of an inference pass against float64 and `nn.functional`."""

import ctypes

import pytest
import torch
from torch.nn import functional as F

from kernels.attention.linear import fused_linear_norm, fused_linears, linear_fwd
from kernels.build import library_path
from kernels.dispatch import available_backends, use_backend
from kernels.runtime.instruction_sets import ISAS, usable_isas

BACKENDS = [name for name in ("cpu", "reference") if available_backends()[name] is None]
RUNNING_SUM = not any(ISAS[isa].startswith(("avx512", "amx")) for isa in usable_isas(ctypes.CDLL(library_path())))
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


def inputs(shape, widths, dtype, seed=0):
    """x [..., K], and a weight and bias for every width."""
    g = torch.Generator().manual_seed(seed)
    depth = shape[-1]
    x = torch.randn(shape, generator=g).to(dtype)
    weights = [(torch.randn(n, depth, generator=g) * depth**-0.5).to(dtype) for n in widths]
    return x, weights, [torch.randn(n, generator=g).to(dtype) for n in widths]


def error(value, exact):
    return float((value.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-30))


def check(own, eager, exact, dtype, depth=0):
    """At most twice eager's error, and a few roundings where eager happens to be nearly exact.

    Without AVX-512 a sum over `depth` terms is one running sum, whose roundings add up like a random walk's steps:
    sqrt(depth) / 4 of them.
    """
    assert own.dtype == dtype
    assert own.shape == exact.shape
    assert error(own, exact) <= 2 * error(eager, exact) + (4 + depth**0.5 / 4) * UNIT[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 7), (7, 45), (2, 65, 135), (97, 541), (3, 1, 540)], ids=str)
def test_several_layers_of_one_input(backend, dtype, shape):
    x, weights, biases = inputs(shape, (45, 1, 97), dtype)
    with use_backend(backend, strict=True):
        outs = fused_linears(x, weights, biases)
    for own, w, b in zip(outs, weights, biases, strict=True):
        check(own, F.linear(x, w, b), F.linear(x.double(), w.double(), b.double()), dtype, RUNNING_SUM * shape[-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("shape", "width"), [((1, 7), 31), ((2, 65, 135), 540), ((97, 541), 33)], ids=str)
def test_residual_and_layer_norm(backend, dtype, shape, width):
    x, (w, _), (b, scale) = inputs(shape, (width, width), dtype)
    residual = torch.randn(*shape[:-1], width, generator=torch.Generator().manual_seed(1)).to(dtype)
    shift = torch.linspace(-1, 1, width).to(dtype)

    def reference(*tensors):
        x, w, b, residual, scale, shift = tensors
        return F.layer_norm(residual + F.linear(x, w, b), (width,), scale, shift, 1e-12)

    tensors = (x, w, b, residual, scale, shift)
    with use_backend(backend, strict=True):
        own = fused_linear_norm(*tensors, eps=1e-12)
    check(own, reference(*tensors), reference(*(t.double() for t in tensors)), dtype)


def test_strided_weights_and_rows_are_read_in_place():
    x, (wide,), (b,) = inputs((70, 64), (90,), torch.float32)
    own = fused_linears(x[:, :33], [wide[:45, :33]], [b[:45]])[0]
    torch.testing.assert_close(own, F.linear(x[:, :33], wide[:45, :33], b[:45]), rtol=1e-5, atol=1e-5)


def test_no_tokens_and_other_dtypes():
    x, weights, biases = inputs((0, 33), (45,), torch.float32)
    assert fused_linears(x, weights, biases)[0].shape == (0, 45)
    x, weights, biases = inputs((5, 33), (45,), torch.float64)
    torch.testing.assert_close(fused_linears(x, weights, biases)[0], F.linear(x, weights[0], biases[0]))


def test_opcheck():
    x, weights, biases = inputs((9, 33), (45, 45), torch.float32)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(linear_fwd, (x, weights, biases, None, [], 0.0), test_utils=utils)
    residual = torch.randn(9, 45)
    torch.library.opcheck(linear_fwd, (x, weights[:1], biases[:1], residual, biases, 1e-12), test_utils=utils)


def test_what_does_not_fit_is_named():
    x, weights, biases = inputs((9, 33), (45,), torch.float32)
    with pytest.raises(ValueError, match="0 weights and 0 biases"):
        fused_linears(x, [], [])
    with pytest.raises(ValueError, match=r"weight \(45, 33\) torch.bfloat16"):
        fused_linears(x, [weights[0].bfloat16()], biases)
    with pytest.raises(ValueError, match=r"residual \(9, 44\)"):
        fused_linear_norm(x, weights[0], biases[0], torch.ones(9, 44), biases[0], biases[0])
    with pytest.raises(ValueError, match=r"ln_bias \(44,\) must be \(45,\)"):
        fused_linear_norm(x, weights[0], biases[0], torch.ones(9, 45), biases[0], torch.ones(44))
