"""The fused losses against eager, materialized ones in float64: values, gradients, padding, registration, memory."""

from __future__ import annotations

import pytest
import torch
from losses_cases import (
    assert_close_as_eager,
    eager_hidden_mse,
    eager_score_mse,
    error,
    heads,
    random_mask,
)

from kernels.backends.cpu import CpuBackend
from kernels.build import library_path
from kernels.dispatch import load_backend, use_backend
from kernels.losses import registration
from kernels.losses.ops import (
    attention_score_mse,
    attention_score_mse_layers,
    hidden_mse,
    hidden_mse_layers,
    soft_cross_entropy,
)
from kernels.runtime.instruction_sets import ENVIRONMENT, ISAS, usable_isas

# Gradients in float32 are a few roundings of 6e-8; in bfloat16 the result itself is rounded to 2^-9, and so is the
# difference that is multiplied with keys and queries.
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 3e-3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
MASKS = pytest.mark.parametrize("kind", ["full", "prefix", "gaps"])
SHAPES = [(2, 3, 37, 45, 64), (3, 1, 1, 7, 1), (2, 2, 130, 1, 45), (1, 2, 601, 16, 8), (2, 1, 96, 32, 541)]


def with_gradients(function, tensors):
    """Value and gradients of `function(*tensors)` for those that require them."""
    loss = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def as_dtype(tensors, dtype):
    return [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in tensors]


def score_inputs(shape, dtype, scale=1.0):
    batch, count, length, d_s, d_t = shape
    student = [heads((batch, count, length, d_s), dtype, seed=s, grad=True, scale=scale) for s in (1, 2)]
    teacher = [heads((batch, count, length, d_t), dtype, seed=s, scale=scale) for s in (3, 4)]
    return [*student, *teacher]


@pytest.mark.parametrize("method", ["auto", "tiled", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@MASKS
@DTYPES
def test_scores_are_as_accurate_as_eager(dtype, kind, shape, method):
    inputs, mask = score_inputs(shape, dtype), random_mask(shape[0], shape[2], kind)
    exact = with_gradients(lambda *t: eager_score_mse(*t, mask), as_dtype(inputs, torch.float64))
    eager = with_gradients(lambda *t: eager_score_mse(*t, mask), inputs)
    ours = with_gradients(lambda *t: attention_score_mse(*t, mask, method=method), inputs)
    assert ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [dtype] * 2
    assert_close_as_eager(ours, eager, exact, FLOOR[dtype])


@pytest.mark.parametrize("noise", [1e-1, 1e-3, 1e-5, 1e-7, 0.0])
def test_tiny_losses_keep_three_digits(noise):
    """Student and teacher nearly equal in every score: the Gram form cancels, and must be left where not proven."""
    shape = (1, 2, 700, 24, 24)
    _, _, q_t, k_t = score_inputs(shape, torch.float32, scale=30.0)  # large scores, so that cancelling hurts
    q_s, k_s = (t + noise * heads(shape[:4], seed=s) for t, s in ((q_t, 5), (k_t, 6)))
    inputs = [q_s.detach().requires_grad_(), k_s.detach().requires_grad_(), q_t, k_t]
    mask = random_mask(1, 700, "full")
    exact = with_gradients(lambda *t: eager_score_mse(*t, mask), as_dtype(inputs, torch.float64))
    eager = with_gradients(lambda *t: eager_score_mse(*t, mask), inputs)
    ours = with_gradients(lambda *t: attention_score_mse(*t, mask), inputs)
    if noise == 0.0:
        assert ours[0] == 0.0
    # 1e-3 is what the Gram form is accepted at; where it is refused, tiles are as good as eager
    assert error(ours[0], exact[0]) <= 1e-3 + 2 * error(eager[0], exact[0])
    for own, other, reference in zip(ours[1:], eager[1:], exact[1:], strict=True):
        assert error(own, reference) <= 1e-3 + 2 * error(other, reference)


def test_the_gram_form_alone_is_wrong_where_auto_refuses_it():
    """Proof that the test above is adversarial: forced, the Gram form loses all digits at such a loss."""
    _, _, q_t, k_t = score_inputs((1, 1, 700, 24, 24), torch.float32, scale=1000.0)
    q_s = q_t * (1 + 2**-22)
    mask = random_mask(1, 700, "full")
    exact = eager_score_mse(*(t.double() for t in (q_s, k_t, q_t, k_t)), mask)
    assert exact > 0
    assert error(attention_score_mse(q_s, k_t, q_t, k_t, mask, method="gram"), exact) > 1e-3


@MASKS
@DTYPES
@pytest.mark.parametrize(("width", "teacher_width"), [(540, 768), (45, 541), (7, 1)], ids=str)
def test_hidden_states_are_as_accurate_as_eager(width, teacher_width, dtype, kind):
    mask = random_mask(3, 61, kind)
    student = [heads((3, 1, 61, width), dtype, seed=s, grad=True)[:, 0] for s in range(3)]
    student = [h.detach().requires_grad_() for h in student]
    teacher = [heads((3, 1, 61, teacher_width), dtype, seed=s + 9)[:, 0] for s in range(3)]
    weight = (torch.randn(teacher_width, width, generator=torch.Generator().manual_seed(1)) * width**-0.5).to(dtype)
    fit = [weight.requires_grad_(), torch.linspace(-1, 1, teacher_width).to(dtype).requires_grad_()]
    inputs = [*student, *fit]

    def eager(*t):
        return eager_hidden_mse(t[:3], t[3], t[4], [h.to(t[0].dtype) for h in teacher], mask)

    exact = with_gradients(eager, as_dtype(inputs, torch.float64))
    ours = with_gradients(lambda *t: hidden_mse_layers(t[:3], t[3], t[4], teacher, mask), inputs)
    assert_close_as_eager(ours, with_gradients(eager, inputs), exact, FLOOR[dtype])
    frozen = with_gradients(lambda *t: hidden_mse_layers(t, *(p.detach() for p in fit), teacher, mask), student)
    for a, b in zip(frozen, ours, strict=False):
        assert torch.equal(a, b)


def test_projection_follows_autocast():
    mask, fit = random_mask(2, 40, "prefix"), torch.nn.Linear(45, 30)
    student, teacher = torch.randn(2, 40, 45, requires_grad=True), torch.randn(2, 40, 30)
    inputs = [student, *fit.parameters()]
    exact = with_gradients(lambda h, w, b: hidden_mse(h, w, b, teacher.double(), mask), as_dtype(inputs, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = with_gradients(lambda h, w, b: hidden_mse(h, w, b, teacher, mask), inputs)
        direct = registration.hidden_mse([student], [*fit.parameters()], [teacher], mask, [True] * 3, None)[0]
    assert low[0].dtype == torch.float32
    assert torch.equal(direct, low[0])
    assert error(low[1], exact[1]) < 1e-2  # nothing lower than bfloat16 products
    if isinstance(load_backend("cpu"), str) or ISAS[max(usable_isas(load_backend("cpu")._library))] >= "avx512bf16":
        assert error(low[1], exact[1]) > 1e-5  # bfloat16 products were used; without units for them float32 is faster
    assert low[2].dtype == torch.float32


@DTYPES
@pytest.mark.parametrize("classes", [1, 2, 3, 45, 30522])
def test_soft_cross_entropy_is_as_accurate_as_eager(classes, dtype):
    generator = torch.Generator().manual_seed(classes)
    student = (torch.randn(2, 3, classes, generator=generator) * 4).to(dtype).requires_grad_()
    teacher = (torch.randn(2, 3, classes, generator=generator) * 4).to(dtype)

    def eager(s, dtype_t):
        target = (teacher.to(dtype_t) / 2.0).softmax(-1)
        return torch.nn.functional.cross_entropy((s / 2.0).flatten(0, 1), target.flatten(0, 1)) * 4.0

    exact = with_gradients(lambda s: eager(s, torch.float64), as_dtype([student], torch.float64))
    other = with_gradients(lambda s: eager(s, dtype), [student])
    ours = with_gradients(lambda s: soft_cross_entropy(s, teacher, 2.0), [student])
    assert_close_as_eager(ours, other, exact, FLOOR[dtype])


def test_infinite_logits_of_classes_the_teacher_rules_out():
    student = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    loss = soft_cross_entropy(student, torch.tensor([[0.5, 0.5, -torch.inf]]))
    expected = torch.logaddexp(torch.tensor(1.0), torch.tensor(2.0)) - 1.5
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_agrees(isa, monkeypatch):
    library = load_backend("cpu")._library
    if ISAS.index(isa) not in usable_isas(library):
        pytest.skip(f"this machine does not run {isa}")
    monkeypatch.setenv(ENVIRONMENT, isa)
    own = CpuBackend(library_path()).tensor_ops
    dtype = torch.bfloat16 if "bf16" in isa or isa == "amx" else torch.float32
    for kind in ("prefix", "gaps"):
        inputs = [t.detach() for t in score_inputs((2, 2, 75, 45, 64), dtype)]
        mask = random_mask(2, 75, kind)
        scales = (45**-0.5, 64**-0.5)
        for method in ("tiled", "gram"):
            loss, grads = own.score_mse(*([t] for t in inputs), mask, *scales, method, 64, True)
            wide = as_dtype([t.requires_grad_(k < 2) for k, t in enumerate(inputs)], torch.float64)
            exact = with_gradients(lambda *t, mask=mask: eager_score_mse(*t, mask), wide)
            for value, reference in zip((loss, *grads), exact, strict=True):
                assert error(value, reference) < 2 * FLOOR[dtype]


@DTYPES
def test_layers_sum_and_scale_with_what_comes_in(dtype):
    inputs = [score_inputs((2, 2, 33, 9, 6), dtype), score_inputs((2, 2, 33, 9, 6), dtype, scale=0.5)]
    mask = random_mask(2, 33, "prefix")
    groups = [list(g) for g in zip(*inputs, strict=True)]
    student = [*groups[0], *groups[1]]
    together = attention_score_mse_layers(*groups, mask) * 3
    apart = sum(attention_score_mse(*layer, mask) for layer in inputs) * 3
    torch.testing.assert_close(together, apart)
    for a, b in zip(torch.autograd.grad(together, student), torch.autograd.grad(apart, student), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 2, 5, 3, 4), (2, 2, 0, 3, 4)], ids=["no-samples", "no-positions"])
def test_empty_batches(shape):
    inputs, mask = score_inputs(shape, torch.float32), torch.ones(shape[0], shape[2], dtype=torch.bool)
    loss, *grads = with_gradients(lambda *t: attention_score_mse(*t, mask), inputs)
    assert loss == 0.0
    assert [g.shape for g in grads] == [t.shape for t in inputs[:2]]
    states, fit = torch.randn(*mask.shape, 6, requires_grad=True), torch.nn.Linear(6, 5)
    inputs = [states, *fit.parameters()]
    loss, *grads = with_gradients(lambda *t: hidden_mse(*t, torch.randn(*mask.shape, 5), mask), inputs)
    assert loss == 0.0
    assert all(g.abs().sum() == 0 for g in grads)
    assert soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3)) == 0.0


def test_strides_are_read_in_place_and_gradients_come_in_the_same_layout():
    whole = torch.randn(2, 40, 3, 4 * 8)
    views = [whole[..., k * 8 : (k + 1) * 8].transpose(1, 2).requires_grad_(k < 2) for k in range(4)]
    mask = random_mask(2, 40, "prefix")
    copies = [t.detach().contiguous().requires_grad_(t.requires_grad) for t in views]
    expected = with_gradients(lambda *t: attention_score_mse(*t, mask), copies)
    for a, b in zip(with_gradients(lambda *t: attention_score_mse(*t, mask), views), expected, strict=True):
        assert torch.equal(a, b)
    dense = heads((2, 3, 40, 8), grad=True)
    (grad,) = torch.autograd.grad(attention_score_mse(dense, *views[1:], mask), dense)
    assert grad.stride() == dense.stride()
    odd = torch.randn(2, 3, 8, 40).mT.requires_grad_()  # last dimension not contiguous
    (grad,) = torch.autograd.grad(attention_score_mse(odd, *views[1:], mask), odd)
    (same,) = torch.autograd.grad(attention_score_mse(odd.contiguous(), *views[1:], mask), odd)
    assert torch.equal(grad, same)


def operator_calls(dtype):
    (q_s, k_s, q_t, k_t), mask = score_inputs((2, 2, 9, 5, 3), dtype), random_mask(2, 9, "prefix")
    states = [torch.randn(2, 9, 4, dtype=dtype, requires_grad=True) for _ in range(2)]
    fit = [torch.randn(6, 4, dtype=dtype, requires_grad=True), torch.randn(6, dtype=dtype, requires_grad=True)]
    teacher = [torch.randn(2, 9, 6, dtype=dtype) for _ in range(2)]
    logits = torch.randn(4, 3, dtype=dtype, requires_grad=True), torch.randn(4, 3, dtype=dtype)
    return {
        "score_mse": (registration.score_mse, ([q_s], [k_s], [q_t], [k_t], mask, 0.5, 1.0, "tiled", 4, True)),
        "hidden_mse": (registration.hidden_mse, (states, fit, teacher, mask, [True, True, True], None)),
        "soft_cross_entropy": (registration.soft_cross_entropy, (*logits, 2.0, True)),
    }


@pytest.mark.parametrize("name", ["score_mse", "hidden_mse", "soft_cross_entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu-kernels", "reference"])
def test_operators_are_registered_properly(name, dtype):
    operator, arguments = operator_calls(dtype)[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", ["score_mse", "hidden_mse", "soft_cross_entropy"])
def test_gradients_match_differences_in_float64(name):
    operator, arguments = operator_calls(torch.float64)[name]
    flat = [t for a in arguments for t in (a if isinstance(a, list) else [a])]
    leaves = [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]

    def call(*values):
        rest = iter(values)
        swap = lambda t: next(rest) if isinstance(t, torch.Tensor) and t.requires_grad else t  # noqa: E731
        return operator(*([swap(t) for t in a] if isinstance(a, list) else swap(a) for a in arguments))[0]

    assert torch.autograd.gradcheck(call, leaves)


def test_losses_compile_without_a_break():
    (q_s, k_s, q_t, k_t), mask = score_inputs((2, 2, 20, 8, 8), torch.float32), random_mask(2, 20, "prefix")
    fit = torch.nn.Linear(16, 12)
    states, teacher = torch.randn(2, 20, 16), torch.randn(2, 20, 12)

    def step(q, k, h, w, b):
        return attention_score_mse(q, k, q_t, k_t, mask) + 2 * hidden_mse(h, w, b, teacher, mask)

    leaves = [q_s, k_s, states.requires_grad_(), *fit.parameters()]
    expected = with_gradients(step, leaves)
    for a, b in zip(with_gradients(torch.compile(step, fullgraph=True), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_forced_reference_is_honoured():
    inputs, mask = score_inputs((1, 2, 80, 8, 8), torch.float32), random_mask(1, 80, "full")
    ours = with_gradients(lambda *t: attention_score_mse(*t, mask), inputs)
    with use_backend("reference", strict=True):
        reference = with_gradients(lambda *t: attention_score_mse(*t, mask), inputs)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_without_gradients_only_the_loss_is_computed():
    inputs, mask = score_inputs((1, 2, 80, 8, 8), torch.float32), random_mask(1, 80, "full")
    with torch.no_grad():
        loss = attention_score_mse(*inputs, mask)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, attention_score_mse(*inputs, mask).detach())


def test_second_derivatives_are_refused():
    inputs, mask = score_inputs((1, 1, 6, 3, 3), torch.float64), random_mask(1, 6, "full")
    loss = attention_score_mse(*inputs, mask)
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(grad.square().sum(), inputs[0])
