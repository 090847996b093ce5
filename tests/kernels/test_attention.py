"""Fused attention with its score loss against eager, materialized attention in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from losses_cases import assert_close_as_eager, eager_attention, eager_score_mse, heads, random_mask

from kernels import fused_attention
from kernels.attention import registration
from kernels.backends.cpu import CpuBackend
from kernels.build import library_path
from kernels.dispatch import load_backend
from kernels.reference.philox import dropout_mask
from kernels.runtime.instruction_sets import ENVIRONMENT, ISAS, usable_isas

# float32: a few roundings of 6e-8 in scores, exponentials and sums; bfloat16: the result, the probabilities and their
# gradients are each rounded to 2^-9
FLOOR = {torch.float32: 4e-7, torch.bfloat16: 5e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPES = [(2, 3, 37, 45, 64), (3, 1, 1, 7, 1), (2, 2, 130, 1, 45), (1, 2, 601, 16, 8), (2, 1, 96, 64, 135)]


def make(shape, dtype):
    batch, count, length, d, d_t = shape
    own = [heads((batch, count, length, d), dtype, seed=s, grad=True) for s in range(3)]
    teacher = tuple(heads((batch, count, length, d_t), dtype, seed=s) for s in (7, 8))
    upstream = heads((batch, count, length, d), dtype, seed=9)
    return own, teacher, upstream


def results(function, own, upstream):
    """context, loss, and gradients of <context, upstream> + 3 loss."""
    context, loss = function(*own)
    total = (context.to(loss.dtype) * upstream.to(loss.dtype)).sum() + 3 * loss
    return [context.detach(), loss.detach(), *torch.autograd.grad(total, own)]


def eager(teacher, mask, factors=None):
    def run(q, k, v):
        q_t, k_t = (t.to(q.dtype) for t in teacher)
        return eager_attention(q, k, v, mask, factors), eager_score_mse(q, k, q_t, k_t, mask)

    return run


def wide(own):
    return [t.detach().double().requires_grad_() for t in own]


@pytest.mark.parametrize("p_drop", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["full", "prefix", "gaps"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_context_loss_and_gradients_are_as_accurate_as_eager(dtype, shape, kind, p_drop):
    own, teacher, upstream = make(shape, dtype)
    mask = random_mask(shape[0], shape[2], kind)
    factors = None
    if p_drop:
        batch, count, length, *_ = shape
        factors = dropout_mask((batch, count, length, length), p_drop, 11).double() / (1 - p_drop)
    exact = results(eager(teacher, mask, factors), wide(own), upstream)
    other = results(eager(teacher, mask, factors), own, upstream)
    ours = results(lambda *t: fused_attention(*t, mask, teacher=teacher, p_drop=p_drop, seed=11), own, upstream)
    assert [t.dtype for t in ours] == [dtype, torch.float32, *[dtype] * 3]
    assert_close_as_eager(ours, other, exact, FLOOR[dtype])


@DTYPES
def test_without_a_teacher_it_is_scaled_dot_product_attention(dtype):
    own, _, upstream = make((2, 3, 70, 45, 1), dtype)
    mask = torch.arange(70)[None] < torch.tensor([70, 31])[:, None]
    context, loss = fused_attention(*own, mask)
    assert loss is None
    assert context.shape == own[0].shape
    assert context.transpose(1, 2).is_contiguous()
    expected = F.scaled_dot_product_attention(*own, attn_mask=mask[:, None, None, :])
    tolerance = {"rtol": 0, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 3e-2}
    torch.testing.assert_close(context, expected, **tolerance)  # padded queries included
    gradients = [torch.autograd.grad(c, own, upstream) for c in (context, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **{k: 3 * v for k, v in tolerance.items()})


def test_scores_of_any_size_do_not_overflow():
    own, _, upstream = make((1, 2, 700, 16, 1), torch.float32)
    own = [(t.detach() * (60 if k == 0 else 1)).requires_grad_() for k, t in enumerate(own)]
    mask = random_mask(1, 700, "full")
    context, _ = fused_attention(*own, mask)
    expected = eager_attention(*wide(own), mask)
    torch.testing.assert_close(context.double(), expected, rtol=0, atol=1e-3)  # scores near 500 carry 3e-5
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(context, own, upstream))


def test_samples_without_tokens_and_their_gradients_are_zero():
    own, teacher, upstream = make((2, 2, 33, 5, 3), torch.float32)
    mask = torch.zeros(2, 33, dtype=torch.bool)
    for values in (results(lambda *t: fused_attention(*t, mask, teacher=teacher), own, upstream),):
        assert all(t.abs().sum() == 0 for t in values)
    empty = [t[:0].detach().requires_grad_() for t in own]
    context, _ = fused_attention(*empty, mask[:0])
    assert context.shape == empty[0].shape


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees(isa, monkeypatch):
    if ISAS.index(isa) not in usable_isas(load_backend("cpu")._library):
        pytest.skip(f"this machine does not run {isa}")
    monkeypatch.setenv(ENVIRONMENT, isa)
    kernels = CpuBackend(library_path()).tensor_ops
    dtype = torch.bfloat16 if "bf16" in isa or isa == "amx" else torch.float32
    own, (q_t, k_t), upstream = make((2, 2, 75, 45, 64), dtype)
    q, k, v = (t.detach() for t in own)
    seed = torch.tensor([5])
    factors = dropout_mask((2, 2, 75, 75), 0.25, 5).double() / 0.75
    for kind in ("prefix", "gaps"):
        mask = random_mask(2, 75, kind)
        rest = (45**-0.5, 0.25, seed, q_t, k_t, 64**-0.5)
        context, lse, loss = kernels.attention_forward(q, k, v, mask, *rest)
        grad = upstream.transpose(1, 2)
        grads = kernels.attention_backward(grad, torch.tensor(3.0), q, k, v, mask, context, lse, *rest)
        exact = results(eager((q_t, k_t), mask, factors), wide(own), upstream)
        assert_close_as_eager([context.transpose(1, 2), loss, *grads], exact, exact, 2 * FLOOR[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu-kernels", "reference"])
@pytest.mark.parametrize("p_drop", [0.0, 0.5])
def test_operators_are_registered_properly(dtype, p_drop):
    (q, k, v), (q_t, k_t), _ = make((2, 2, 9, 5, 3), dtype)
    mask, seed = random_mask(2, 9, "prefix"), torch.tensor([3])
    torch.library.opcheck(registration.attention_fwd, (q, k, v, mask, 0.5, p_drop, seed, q_t, k_t, 1.0))
    torch.library.opcheck(registration.attention_fwd, (q, k, v, mask, 0.5, p_drop, seed, None, None, 1.0))


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_gradients_match_differences_in_float64(p_drop):
    own, teacher, _ = make((2, 2, 6, 3, 4), torch.float64)
    mask = random_mask(2, 6, "prefix")
    torch.autograd.gradcheck(lambda *t: fused_attention(*t, mask, teacher=teacher, p_drop=p_drop, seed=1), own)


def test_compiles_without_a_break():
    own, teacher, upstream = make((2, 2, 20, 8, 6), torch.float32)
    mask = random_mask(2, 20, "prefix")

    def run(*t):
        return fused_attention(*t, mask, teacher=teacher)

    compiled = torch.compile(run, fullgraph=True)
    for a, b in zip(results(compiled, own, upstream), results(run, own, upstream), strict=True):
        torch.testing.assert_close(a, b)


def test_seeds():
    own, _, _ = make((1, 2, 40, 8, 1), torch.float32)
    mask = random_mask(1, 40, "full")
    contexts = [fused_attention(*own, mask, p_drop=0.5, seed=s)[0] for s in (1, 1, 2, None, None)]
    assert torch.equal(contexts[0], contexts[1])
    assert all(not torch.equal(contexts[0], c) for c in contexts[2:])
    assert not torch.equal(contexts[3], contexts[4])
    torch.manual_seed(0)
    first = fused_attention(*own, mask, p_drop=0.5)[0]
    torch.manual_seed(0)
    assert torch.equal(first, fused_attention(*own, mask, p_drop=0.5)[0])


def test_second_derivatives_are_refused():
    own, _, _ = make((1, 1, 6, 3, 1), torch.float32)
    context, _ = fused_attention(*own, random_mask(1, 6, "full"))
    (grad,) = torch.autograd.grad(context.sum(), own[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.square().sum(), own[1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(v=a["v"][..., :2]), ["values", "(1, 2, 6, 2)"]),
        (lambda a: a.update(mask=a["mask"].long()), ["boolean"]),
        (lambda a: a.update(p_drop=1.5), ["p_drop", "1.5"]),
        (lambda a: a.update(teacher=(a["q"][:, :1], a["k"][:, :1])), ["2 heads", "teacher 1"]),
    ],
    ids=["values", "mask", "p_drop", "heads"],
)
def test_what_is_wrong_is_named(change, words):
    (q, k, v), teacher, _ = make((1, 2, 6, 4, 4), torch.float32)
    arguments = {"q": q, "k": k, "v": v, "mask": random_mask(1, 6, "full"), "teacher": teacher, "p_drop": 0.0}
    change(arguments)
    with pytest.raises(ValueError) as caught:
        fused_attention(**arguments)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_linear_in_length_and_a_third_of_eager():
    """Highest resident size of one forward and backward pass, each side in a process of its own."""

    def peak(side, length):
        command = [sys.executable, "-m", "benchmarks.losses", "--one", side, "fp32", str(length)]
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    for side in ("apart", "together"):
        short, long = peak(side, 512), peak(side, 2048)
        assert long <= 4.5 * short
        assert short <= peak("eager", 512) / 3
