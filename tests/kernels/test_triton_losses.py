"""The Triton losses and attention against float64, materialized ones: under Triton's interpreter, and on a GPU.

Triton decides when a kernel is defined whether it is interpreted, so the interpreter needs a process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels/test_triton_losses.py    the interpreter's half of this file
    pytest tests/kernels/test_triton_losses.py                       runs the same in a child process, as one test
    pytest -m gpu tests/kernels/test_triton_losses.py                the same tests on a CUDA device

Accuracy is judged as in `test_attention` and `test_losses_fused`: twice eager's own error and a floor, of a few
roundings of the dtype. bfloat16 runs on a GPU only: the interpreter computes it wrongly, and the backend refuses it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from losses_cases import (
    assert_close_as_eager,
    eager_attention,
    eager_hidden_mse,
    eager_score_mse,
    error,
    heads,
    random_mask,
)
from triton_places import GPU, INTERPRETER, passes_under_the_interpreter, triton_device  # noqa: F401  a fixture

from kernels.attention.ops import fused_attention
from kernels.dispatch import BackendError, use_backend
from kernels.losses.ops import attention_score_mse, attention_score_mse_layers, hidden_mse_layers, soft_cross_entropy
from kernels.reference.philox import dropout_mask

FLOOR = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 5e-3}
"""float32: a few roundings of 6e-8; 16-bit: results, probabilities and differences are each rounded once."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
SHAPES = [(2, 1, 37, 45, 64), (3, 1, 1, 7, 1), (1, 2, 50, 16, 8)]
"""(B, heads, S, d, d_t): several blocks with odd rests of each; one row."""


@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
def test_under_the_interpreter():
    passes_under_the_interpreter(__file__)


def skip_bfloat16(dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")


def with_gradients(function, tensors):
    """Value and gradients of `function(*tensors)` for those that require them, on the CPU."""
    loss = function(*tensors)
    return [loss.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(loss, [t for t in tensors if t.requires_grad]))]


def moved(tensors, device, dtype=None):
    return [t.detach().to(device, dtype).requires_grad_(t.requires_grad) for t in tensors]


def score_inputs(shape, dtype, scale=1.0):
    batch, count, length, d_s, d_t = shape
    student = [heads((batch, count, length, d_s), dtype, seed=s, grad=True, scale=scale) for s in (1, 2)]
    return [*student, *(heads((batch, count, length, d_t), dtype, seed=s, scale=scale) for s in (3, 4))]


def attention_results(function, own, upstream):
    """context, loss, and gradients of <context, upstream> + 3 loss, on the CPU."""
    context, loss = function(*own)
    total = (context.to(loss.dtype) * upstream.to(loss.device, loss.dtype)).sum() + 3 * loss
    return [t.detach().cpu() for t in (context, loss, *torch.autograd.grad(total, own))]


@DTYPES
@pytest.mark.parametrize(("shape", "kind", "p_drop"), [
    (SHAPES[0], "gaps", 0.1), (SHAPES[0], "prefix", 0.0), (SHAPES[1], "full", 0.5), (SHAPES[2], "full", 0.0),
], ids=str)  # fmt: skip
def test_context_loss_and_gradients_are_as_accurate_as_eager(device, dtype, shape, kind, p_drop):
    skip_bfloat16(dtype, device)
    batch, count, length, d, d_t = shape
    own = [heads((batch, count, length, d), dtype, seed=s, grad=True) for s in range(3)]
    teacher = [heads((batch, count, length, d_t), dtype, seed=s) for s in (7, 8)]
    upstream = heads((batch, count, length, d), dtype, seed=9)
    mask = random_mask(batch, length, kind)
    factors = dropout_mask((batch, count, length, length), p_drop, 11).double() / (1 - p_drop) if p_drop else None

    def eager(q, k, v):
        q_t, k_t = (t.to(q.dtype) for t in teacher)
        return eager_attention(q, k, v, mask, factors), eager_score_mse(q, k, q_t, k_t, mask)

    def ours(*qkv):
        there = tuple(moved(teacher, device))
        return fused_attention(*qkv, mask.to(device), teacher=there, p_drop=p_drop, seed=11)

    exact = attention_results(eager, moved(own, "cpu", torch.float64), upstream)
    values = attention_results(ours, moved(own, device), upstream)
    assert [t.dtype for t in values] == [dtype, torch.float32, *[dtype] * 3]
    assert_close_as_eager(values, attention_results(eager, own, upstream), exact, FLOOR[dtype])


@DTYPES
def test_without_a_teacher_it_is_scaled_dot_product_attention(device, dtype):
    skip_bfloat16(dtype, device)
    own = [heads((2, 1, 35, 45), dtype, seed=s, grad=True) for s in range(3)]
    upstream = heads((2, 1, 35, 45), dtype, seed=9)
    mask = torch.arange(35)[None] < torch.tensor([35, 18])[:, None]
    there = moved(own, device)
    context, loss = fused_attention(*there, mask.to(device))
    assert loss is None
    grads = torch.autograd.grad(context, there, upstream.to(device))
    wide = moved(own, "cpu", torch.float64)
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask[:, None, None, :])
    for a, b in zip(
        (context, *grads), (expected, *torch.autograd.grad(expected, wide, upstream.double())), strict=True
    ):
        assert error(a.detach().cpu(), b.detach()) < {torch.float32: 2e-6}.get(dtype, 2 * FLOOR[dtype])


def test_large_scores_samples_without_tokens_and_padding_that_is_not_a_number(device):
    own = [heads((2, 1, 34, 16), seed=s, scale=8.0 if s < 2 else 1.0, grad=True) for s in range(3)]
    teacher = [heads((2, 1, 34, 8), seed=s) for s in (7, 8)]
    mask = torch.arange(34)[None] < torch.tensor([34, 0])[:, None]
    there = moved(own, device)
    context, loss = fused_attention(*there, mask.to(device), teacher=tuple(moved(teacher, device)))
    assert context[1].abs().sum() == 0
    grads = torch.autograd.grad(context.square().sum() + loss, there)
    assert all(torch.isfinite(g).all() and g[1].abs().sum() == 0 for g in grads)
    expected = eager_attention(*moved(own, "cpu", torch.float64), mask)
    torch.testing.assert_close(context.cpu().double(), expected, rtol=0, atol=1e-3)  # scores of hundreds carry 3e-5
    holes = (~mask)[:, None, :, None]
    dirty = [t.detach().masked_fill(holes, float("nan")).to(device) for t in (*own[:2], *teacher)]
    clean = [t.detach().to(device) for t in (*own[:2], *teacher)]
    assert torch.equal(*(attention_score_mse(*x, mask.to(device), method="tiled") for x in (dirty, clean)))


@DTYPES
@pytest.mark.parametrize("method", ["tiled", "gram"])
@pytest.mark.parametrize("kind", ["prefix", "gaps"])
def test_scores_are_as_accurate_as_eager(device, dtype, kind, method):
    """Both samples short or one empty; gaps."""
    skip_bfloat16(dtype, device)
    for shape in SHAPES if dtype == torch.float32 else SHAPES[:1]:
        inputs, mask = score_inputs(shape, dtype), random_mask(shape[0], shape[2], kind)
        exact = with_gradients(lambda *t, m=mask: eager_score_mse(*t, m), moved(inputs, "cpu", torch.float64))
        eager = with_gradients(lambda *t, m=mask: eager_score_mse(*t, m), inputs)
        there = moved(inputs, device)
        ours = with_gradients(lambda *t, m=mask: attention_score_mse(*t, m.to(device), method=method), there)
        assert_close_as_eager(ours, eager, exact, FLOOR[dtype])


@pytest.mark.parametrize("noise", [1.0, 0.0])
def test_auto_takes_the_gram_form_only_where_it_is_proven(device, noise, monkeypatch):
    """Two heads; in one of them student and teacher are `noise` apart in every score, where the Gram form cancels."""
    from kernels.triton import losses

    seen = []
    gram = losses._gram

    def watched(s, m, share, done, *rest):
        seen.append(done)
        return gram(s, m, share, done, *rest)

    monkeypatch.setattr(losses, "_gram", watched)
    q_t, k_t = (heads((1, 2, 80, 6), seed=s, scale=30.0) for s in (3, 4))
    apart = torch.tensor([1.0, noise])[None, :, None, None]
    q_s, k_s = (t + apart * heads(t.shape, seed=s) for t, s in ((q_t, 5), (k_t, 6)))
    inputs = [q_s.requires_grad_(), k_s.requires_grad_(), q_t, k_t]
    mask = random_mask(1, 80, "full")
    exact = with_gradients(lambda *t: eager_score_mse(*t, mask), moved(inputs, "cpu", torch.float64))
    ours = with_gradients(lambda *t: attention_score_mse(*t, mask.to(device)), moved(inputs, device))
    assert seen[0].cpu().tolist() == [[1, int(noise > 0)]]
    assert all(error(a, b) < 1e-3 for a, b in zip(ours, exact, strict=True))


def test_all_layers_of_a_step_in_one_launch_per_direction(device, monkeypatch):
    from kernels.triton import losses

    launched = []
    plain = losses.launch
    monkeypatch.setattr(losses, "launch", lambda k, *a, **o: (launched.append(k.fn.__name__), plain(k, *a, **o)))
    mask = random_mask(2, 20, "gaps")
    layers = [moved(score_inputs((2, 1, 20, 5, 3), torch.float32, 1.0 + k), device) for k in range(3)]
    groups = list(zip(*layers, strict=True))
    loss = attention_score_mse_layers(*groups, mask.to(device))
    grads = torch.autograd.grad(loss, [*groups[0], *groups[1]])
    assert launched == ["score_mse_kernel"] * 2
    alone = [with_gradients(lambda *t: attention_score_mse(*t, mask.to(device)), layer) for layer in layers]
    torch.testing.assert_close(loss.cpu(), sum(a[0] for a in alone))
    for own, expected in zip(grads, [*(a[1] for a in alone), *(a[2] for a in alone)], strict=True):
        assert torch.equal(own.cpu(), expected)
    odd = [list(g) for g in groups]
    odd[0][1] = odd[0][1].detach().contiguous().requires_grad_()  # another layout: layer by layer
    torch.testing.assert_close(attention_score_mse_layers(*odd, mask.to(device)), loss)


@DTYPES
@pytest.mark.parametrize(("width", "teacher_width"), [(45, 64), (7, 1), (54, 135)], ids=str)
def test_hidden_states_are_as_accurate_as_eager(device, dtype, width, teacher_width, monkeypatch):
    from kernels.triton import losses

    skip_bfloat16(dtype, device)
    monkeypatch.setattr(losses, "CHUNK", 64)  # several chunks of every layer
    monkeypatch.setattr(losses, "_GROUP", 32)
    mask = random_mask(3, 31, "prefix")
    student = [heads((3, 1, 31, width), dtype, seed=s, grad=True)[:, 0].detach().requires_grad_() for s in range(2)]
    teacher = [heads((3, 1, 31, teacher_width), dtype, seed=s + 9)[:, 0] for s in range(2)]
    weight = (torch.randn(teacher_width, width, generator=torch.Generator().manual_seed(1)) * width**-0.5).to(dtype)
    inputs = [*student, weight.requires_grad_(), torch.linspace(-1, 1, teacher_width).to(dtype).requires_grad_()]

    def eager(*t):
        return eager_hidden_mse(t[:2], t[2], t[3], [h.to(t[0].dtype) for h in teacher], mask)

    def ours(*t):
        return hidden_mse_layers(t[:2], t[2], t[3], moved(teacher, device), mask.to(device))

    exact = with_gradients(eager, moved(inputs, "cpu", torch.float64))
    values = with_gradients(ours, moved(inputs, device))
    assert_close_as_eager(values, with_gradients(eager, inputs), exact, FLOOR[dtype])
    some = moved(inputs, device)
    some[0].requires_grad_(False), some[1].requires_grad_(False), some[3].requires_grad_(False)
    assert torch.equal(with_gradients(ours, some)[1], values[3])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device, and the interpreter computes bfloat16 wrongly")
def test_projection_follows_autocast():
    mask, fit = random_mask(2, 20, "prefix").cuda(), torch.nn.Linear(45, 30).cuda()
    student, teacher = torch.randn(2, 20, 45).cuda().requires_grad_(), torch.randn(2, 20, 30).cuda()

    def run(*t):
        return hidden_mse_layers([t[0]], t[1], t[2], [teacher], mask)

    with use_backend("triton", strict=True):
        exact = with_gradients(run, [student, *fit.parameters()])
        with torch.autocast("cuda", dtype=torch.bfloat16):
            low = with_gradients(run, [student, *fit.parameters()])
    assert [t.dtype for t in low] == [torch.float32] * 4
    assert 1e-5 < error(low[1], exact[1].double()) < 1e-2


@DTYPES
@pytest.mark.parametrize("classes", [1, 2, 45, 2050])
def test_soft_cross_entropy_is_as_accurate_as_eager(device, dtype, classes):
    skip_bfloat16(dtype, device)
    generator = torch.Generator().manual_seed(classes)
    student, teacher = ((torch.randn(5, classes, generator=generator) * 4).to(dtype) for _ in range(2))
    student.requires_grad_()

    def eager(s):
        wide = s.dtype if s.dtype == torch.float64 else torch.float32
        p = (teacher.to(wide) / 2).softmax(-1)
        return -(p * (s.to(wide) / 2).log_softmax(-1)).sum(-1).mean() * 4

    exact = with_gradients(eager, moved([student], "cpu", torch.float64))
    ours = with_gradients(lambda s: soft_cross_entropy(s, teacher.to(device), 2.0), moved([student], device))
    assert_close_as_eager(ours, with_gradients(eager, [student]), exact, FLOOR[dtype])
    extreme = torch.tensor([[1e4, -1e4]], device=device)
    assert soft_cross_entropy(extreme, extreme).item() == 0.0


def test_nothing_to_compare_gives_zero(device):
    mask = torch.zeros(2, 9, dtype=torch.bool, device=device)
    inputs = moved(score_inputs((2, 1, 9, 4, 3), torch.float32), device)
    assert all(t.abs().sum() == 0 for t in with_gradients(lambda *t: attention_score_mse(*t, mask), inputs))
    empty = [t[:0].detach().requires_grad_(t.requires_grad) for t in inputs]
    assert attention_score_mse(*empty, mask[:0]).item() == 0.0
    context, loss = fused_attention(*empty[:2], empty[0], mask[:0], teacher=(empty[2], empty[3]))
    assert context.shape == (0, 1, 9, 4)
    assert loss.item() == 0.0
    assert soft_cross_entropy(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device)).item() == 0.0


def test_wide_heads_and_other_dtypes_are_refused_with_the_reason(device):
    mask = torch.ones(1, 3, dtype=torch.bool, device=device)
    for dtype, most, width in ((torch.float16, 256, 300), (torch.float32, 64, 65)):
        wide = [t.to(device) for t in score_inputs((1, 1, 3, width, 4), dtype)]
        with pytest.raises(BackendError, match=f"{str(dtype)[6:]} heads up to {most} wide, got {width}"):
            attention_score_mse(*wide, mask)
    double = [t.to(device) for t in score_inputs((1, 1, 3, 4, 4), torch.float64)]
    with pytest.raises(BackendError, match="float64"):
        attention_score_mse(*double, mask)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_captured_graph_repeats_the_losses():
    own = [heads((2, 3, 50, 45), torch.bfloat16, seed=s).cuda().requires_grad_() for s in range(3)]
    teacher = tuple(heads((2, 3, 50, 64), torch.bfloat16, seed=s).cuda() for s in (7, 8))
    mask = random_mask(2, 50, "prefix").cuda()

    def run():
        context, loss = fused_attention(*own, mask, teacher=teacher)
        other = attention_score_mse(*own[:2], *teacher, mask)
        return [context, loss, other, *torch.autograd.grad(context.float().sum() + loss + other, own)]

    with use_backend("triton", strict=True):
        expected = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
