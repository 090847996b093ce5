"""The grouped FFN kernels, run through the emulation, against the float64 reference; cuda_cases.py has the rule."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import DTYPE_IDS, DTYPES, complaints, stack
from cuda_emulation import emulation_path

from kernels.cuda import grouped, library
from kernels.cuda import stack as whole_stack

GELU = "linear(gelu(linear(x,wb1)),wb2)"
TANH = "tanh(linear(gelu(linear(x,wb1)),wb2))"
PRE = "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)"
GATE = "linear(relu(mul(linear(x,wb1),x)),wb2)"
PARALLEL = "mul(gelu(linear(x,wb1)),add(tanh(x),linear(swish(x),wb2)))"
POST = "elu(mul(x,linear(gelu(linear(x,wb1)),wb2)))"


@pytest.fixture(autouse=True)
def emulated():
    with library.emulated(emulation_path()):
        yield


def run(stacks, needs=None):
    """Per member (out, *gradients)."""
    calls = [s.call for s in stacks]
    assert grouped.supports(calls) is None
    outs, saved = grouped.forward(calls, True)
    needs = needs or [[True] * len(s.inputs) for s in stacks]
    gradients = grouped.backward(calls, [s.grad_out for s in stacks], saved, needs)
    return [[out, *own] for out, own in zip(outs, gradients, strict=True)]


def check(stacks):
    found = [c for s, own in zip(stacks, run(stacks), strict=True) for c in complaints(s, own)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_members_that_differ_in_everything(dtype):
    check(
        [
            stack(TANH, 9, 45, 33, 3, dtype=dtype, p_drop=0.3, seed=1),
            stack(PRE, 70, 45, 70, 1, dtype=dtype, seed=2),
            stack(GATE, 8, 45, 16, 2, dtype=dtype, p_drop=0.1, seed=3),
            stack(GATE, 12, 16, 45, 1, dtype=dtype, policy="pad", p_drop=0.1, seed=4),
            stack(PARALLEL, 37, 33, 33, 2, dtype=dtype, p_drop=0.2, seed=5),
            stack(POST, 10, 33, 7, 2, dtype=dtype, layer_norm=False, seed=6),
            stack(PARALLEL, 10, 33, 33, 2, dtype=dtype, layer_norm=False, seed=7),
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (3, 130), (7, 2), (130, 135), (32, 128), (129, 64)])
def test_widths_around_tiles(hidden, inner, dtype):
    check([stack(GELU, 9, hidden, inner, dtype=dtype, layer_norm=hidden > 2, p_drop=0.0, seed=hidden)])


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_every_number_of_rows_per_block(rows, monkeypatch):
    monkeypatch.setitem(grouped._ROWS, torch.bfloat16, (rows,))
    check([stack(TANH, 67, 45, 33, dtype=torch.bfloat16, p_drop=0.1), stack(PARALLEL, 3, 17, 17, dtype=torch.bfloat16)])


def test_float32_weights_with_bfloat16_products():
    """As under autocast: x and weights float32, products bfloat16; gradients come back in float32."""
    s = stack(TANH, 9, 45, 33, 2, compute=torch.bfloat16, p_drop=0.2)
    (own,) = run([s])
    assert all(t.dtype == torch.float32 for t in own)
    assert not complaints(s, own)


def test_one_token():
    """A single row: nothing to average over, so only gross errors show; the last columns of every tile are checked."""
    for s in (stack(TANH, 1, 45, 33, 2, seed=8), stack(PARALLEL, 1, 33, 33, seed=9)):
        (own,) = run([s])
        (three,) = run([repeated(s, 3)])
        assert torch.allclose(three[0][2:], own[0], atol=1e-6)
        # three equal rows with equal gradients: three times the parameter gradient
        assert all(torch.allclose(t, 3 * o, rtol=1e-4, atol=1e-5) for t, o in zip(three[2:], own[2:], strict=True))


def repeated(s, times):
    s.call.x = s.call.x.repeat(times, 1)
    s.grad_out = s.grad_out.repeat(times, 1)
    return s


def test_nothing_depends_on_the_order_of_threads():
    stacks = [
        stack(TANH, 40, 45, 33, 2, dtype=torch.bfloat16, p_drop=0.3),
        stack(PARALLEL, 5, 19, 19, dtype=torch.bfloat16),
    ]
    first = run(stacks)
    with library.thread_order(-1):
        second = run(stacks)
    assert all(
        torch.equal(a, b) for own, other in zip(first, second, strict=True) for a, b in zip(own, other, strict=True)
    )


def test_members_do_not_touch_each_other():
    stacks = [stack(t, 5 + k, 9 + k, 9 + k, dtype=torch.float32, seed=k) for k, t in enumerate((TANH, PARALLEL, POST))]
    together = run(stacks)
    for s, own in zip(stacks, together, strict=True):
        (alone,) = run([s])
        assert all(torch.equal(a, b) for a, b in zip(alone, own, strict=True))


def test_more_members_than_one_launch_takes():
    stacks = [stack(TANH, 2, 5, 4, 5, seed=k) for k in range(20)]
    assert [len(m) for m in grouped._launches([s.call for s in stacks])] == [12, 8]
    check_bits = [run([s])[0][0] for s in stacks]
    assert all(torch.equal(own[0], alone) for own, alone in zip(run(stacks), check_bits, strict=True))


def test_a_member_without_tokens():
    empty, full = stack(TANH, 0, 5, 4), stack(TANH, 3, 5, 4)
    (none, own) = run([empty, full])
    assert none[0].shape == (0, 5)
    assert all(not t.any() for t in none)
    assert all(torch.equal(a, b) for a, b in zip(own, run([full])[0], strict=True))


def test_only_wanted_gradients_are_made():
    s = stack(TANH, 5, 9, 7, 2)
    everything = run([s])[0]
    for wanted in range(len(s.inputs)):
        needs = [k == wanted for k in range(len(s.inputs))]
        out, *gradients = run([s], [needs])[0]
        assert torch.equal(out, everything[0])
        assert [g is not None for g in gradients] == needs
        assert torch.equal(gradients[wanted], everything[1 + wanted])


def test_whole_stack_is_the_group_of_one():
    s = stack(GATE, 7, 33, 16, 3, p_drop=0.2)
    assert whole_stack.supports(s.call) is None
    out, saved = whole_stack.forward(s.call, True)
    assert [t.shape for t in saved] == [t.shape for t in whole_stack.saved_like(s.call)]
    gradients = whole_stack.backward(s.call, s.grad_out, saved, [True] * len(s.inputs))
    assert not complaints(s, [out, *gradients])


def test_zero_row_stride():
    s = stack(TANH, 4, 9, 7)
    copied = run([s])[0][0][:1]
    s.call.x = s.call.x[:1].expand(4, -1)
    assert torch.equal(run([s])[0][0], copied.repeat(4, 1))


def test_non_finite_values_stay_in_their_rows():
    s = stack(GELU, 6, 9, 7, layer_norm=False, dtype=torch.bfloat16)
    clean = run([s])[0]
    s.call.x[2, 3], s.call.x[4, 0] = float("nan"), float("inf")
    out, dx, *_ = run([s])[0]
    assert out[2].isnan().all()
    assert not out[4].isfinite().all()
    for row in (0, 1, 3, 5):
        assert torch.equal(out[row], clean[0][row])
        assert torch.equal(dx[row], clean[1][row])


def test_what_is_not_served_is_named():
    assert "shared memory" in grouped.supports([stack(TANH, 1, 16, 20000).call])
    other = stack(TANH, 1, 16, 16, dtype=torch.bfloat16).call
    assert "share" in grouped.supports([stack(TANH, 1, 16, 16).call, other])
    assert "float64" in grouped.supports([stack(TANH, 1, 16, 16, dtype=torch.float64).call])
    assert grouped.supports([stack(TANH, 1, 768, 3072, dtype=torch.bfloat16).call]) is None
