"""The CUDA row kernels, run through the emulation: values, gradients and column sums against float64 autograd.

The reference runs the program's forward post segment with PyTorch operations and differentiates it by autograd, so the
gradient segments are checked against something that never saw them. Bounds count roundings of the result's dtype (half
a unit in the last place) and, for float32 arithmetic, 64 of its units: sums of up to 541 terms, a reciprocal square
root, and an activation within 2 ulp.
"""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DTYPE_IDS, DTYPES, UNIT, stack
from cuda_emulation import emulation_path

from kernels.cuda import library, rows
from kernels.language.execute import run_segment
from kernels.language.program import Flag, Segment
from kernels.language.validation import checked_words
from kernels.reference.philox import dropout, dropout_mask

TEXTS = {
    "tanh": "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "identity": "linear(gelu(linear(x,wb1)),wb2)",
    "gate": "elu(mul(x,linear(gelu(linear(x,wb1)),wb2)))",
    "max": "max(gelu(swish(x)),sigmoid(linear(gelu(linear(x,wb1)),wb2)))",
    "parallel": "mul(gelu_erf(linear(x,wb1)),add(tanh(x),leaky_relu(linear(relu(x),wb2))))",
}


@pytest.fixture(autouse=True)
def emulated():
    with library.emulated(emulation_path()):
        yield


def products(s, seed=5):
    """y, and y2 in the parallel form, in the compute dtype."""
    g = torch.Generator().manual_seed(seed)
    count = 2 if s.call.flags & Flag.PARALLEL else 1
    made = [torch.randn(s.call.x.shape, generator=g).to(s.call.compute_dtype) for _ in range(count)]
    return made[0], made[1] if count == 2 else None


def exact(s, y, y2, layer=0):
    """out, then the gradients of x, y, y2, ln_weight and ln_bias, in float64."""
    call = s.call
    leaves = [call.x, y, y2, *(t[layer] for t in (call.ln_weight, call.ln_bias) if call.has_ln)]
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    x, a, b, *norm = leaves
    value, *_ = run_segment(checked_words(call.program), Segment.POST, x, a, b)
    if call.has_ln:
        value = dropout(value, call.p_drop, int(call.seed) if call.p_drop else 0, stream=layer)
        value = torch.nn.functional.layer_norm(x + value, (call.hidden,), *norm, call.eps)
    given = [t for t in leaves if t is not None]
    gradients = iter(torch.autograd.grad(value, given, s.grad_out.double(), allow_unused=True, materialize_grads=True))
    return [value.detach(), *(None if t is None else next(gradients) for t in leaves)]


def check(s, layer=0, stats=True):
    call = s.call
    y, y2 = products(s)
    out, saved = rows.forward(call, layer, call.x, y, y2, None, True)
    assert (saved is not None) == call.has_ln
    own = rows.backward(call, layer, s.grad_out, call.x, y, y2, saved if stats else None, None)
    dy, dy2, dx, dgamma, dbeta, db_y, db_y2 = own
    value, x_grad, y_grad, y2_grad, *norm = exact(s, y, y2, layer)
    assert out.dtype == call.x.dtype
    assert dy.dtype == call.compute_dtype
    assert (dx is not None) == bool(call.has_ln or call.flags & Flag.POST_USES_X)
    close(out, value)
    close(dy, y_grad)
    close(db_y, y_grad.sum(0))
    if dx is not None:
        assert dx.dtype == torch.float32
        close(dx, x_grad)
    if y2 is not None:
        close(dy2, y2_grad)
        close(db_y2, y2_grad.sum(0))
    for gradient, expected in zip((dgamma, dbeta), norm, strict=False):
        close(gradient, expected)


def close(own, expected):
    """|error| <= one rounding of its dtype + 64 float32 units, of the largest value."""
    limit = (UNIT[own.dtype] + 64 * UNIT[torch.float32]) * float(expected.abs().max())
    assert float((own.double() - expected).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("hidden", [1, 7, 45, 135, 541])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_values_and_gradients(text, hidden, dtype):
    # LayerNorm over one column gives its bias, whatever comes in: its gradients are rounding noise
    norm = hidden > 1
    p_drop = 0.3 if norm else 0.0
    tokens = 11 if hidden < 100 else 3
    check(stack(text, tokens, hidden, hidden, dtype=dtype, p_drop=p_drop, layer_norm=norm, seed=hidden))


def test_layer_norm_over_one_column_is_its_bias():
    s = stack(TEXTS["tanh"], 5, 1, 3)
    y, _ = products(s)
    out, stats = rows.forward(s.call, 0, s.call.x, y, None, None, True)
    assert torch.equal(out, s.call.ln_bias[0].expand(5, 1))
    assert stats.isfinite().all()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_bare_expression(text):
    check(stack(text, 5, 45, 45, layer_norm=False))


def test_float32_input_with_bfloat16_products():
    check(stack(TEXTS["gate"], 5, 45, 45, compute=torch.bfloat16, p_drop=0.2))


def test_rows_wider_than_a_warp_can_hold_take_a_whole_block():
    s = stack(TEXTS["max"], 2, 4099, 3, p_drop=0.2)
    assert rows._plan(s.call, 2, 4, backward=True).wide
    check(s)


def test_statistics_are_computed_again_where_they_were_not_saved():
    check(stack(TEXTS["tanh"], 7, 45, 9, p_drop=0.1), stats=False)


def test_second_layer_of_a_stack_has_its_own_parameters_and_mask():
    check(stack(TEXTS["tanh"], 7, 45, 9, 2, p_drop=0.4), layer=1)


@pytest.mark.parametrize("p_drop", [0.1, 0.5, 1.0])
def test_mask_is_that_of_philox(p_drop):
    """Without post and with zero x, LayerNorm's input is the mask times y: its zeros show in dy."""
    s = stack(TEXTS["identity"], 9, 45, 9, p_drop=p_drop)
    y, _ = products(s)
    dy, *_ = rows.backward(s.call, 0, s.grad_out, s.call.x, y, None, None, None)
    kept = dropout_mask(y.shape, p_drop, int(s.call.seed))
    assert torch.equal(dy != 0, kept)


def test_any_row_stride():
    s = stack(TEXTS["gate"], 6, 45, 9)
    y, _ = products(s)
    expected = rows.forward(s.call, 0, s.call.x, y, None, None, True)
    wide = torch.zeros(6, 101)
    wide[:, 3:48] = s.call.x
    found = rows.forward(s.call, 0, wide[:, 3:48], y, None, None, True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    repeated = rows.forward(s.call, 0, s.call.x[:1].expand(6, -1), y, None, None, False)[0]
    copied = rows.forward(s.call, 0, s.call.x[:1].repeat(6, 1), y, None, None, False)[0]
    assert torch.equal(repeated, copied)


def test_only_wanted_sums_come_back():
    s = stack(TEXTS["identity"], 3, 7, 9)
    needs = rows._ALL.__class__(b1=True, b2=False, ln_weight=False, ln_bias=True)
    y, _ = products(s)
    *_, dgamma, dbeta, db_y, db_y2 = rows.backward(s.call, 0, s.grad_out, s.call.x, y, None, None, None, needs)
    assert dgamma is None
    assert db_y is None
    assert db_y2 is None
    assert dbeta is not None


def test_no_rows():
    s = stack(TEXTS["identity"], 0, 7, 9)
    y, _ = products(s)
    out, _ = rows.forward(s.call, 0, s.call.x, y, None, None, True)
    assert out.shape == (0, 7)
    dy, _, dx, *sums = rows.backward(s.call, 0, s.grad_out, s.call.x, y, None, None, None)
    assert dy.shape == dx.shape == (0, 7)
    assert all(not t.any() for t in sums if t is not None)


def test_many_rows_give_the_same_bits_each_time():
    """More rows than the grid has teams: each takes several, and sums do not depend on the order of threads."""
    s = stack(TEXTS["gate"], 301, 33, 9, p_drop=0.2)
    y, _ = products(s)

    def run():
        return rows.backward(s.call, 0, s.grad_out, s.call.x, y, None, None, None)

    first = run()
    with library.thread_order(-1):
        second = run()
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))
    check(s)


def test_dtypes_and_widths_that_are_not_served_are_named():
    s = stack(TEXTS["tanh"], 3, 7, 9)
    s.call.compute_dtype = torch.float64
    assert "float64" in rows.supports(s.call)
    assert "shared memory" in rows.supports(stack(TEXTS["tanh"], 1, 60000, 1).call)
    assert rows.supports(stack(TEXTS["tanh"], 1, 4096, 1).call) is None
