"""KD losses against float64 loops over real tokens, their gradients, and the published arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kernels.losses.ops import TILE, attention_score_mse, gram_error_bound, hidden_mse, soft_cross_entropy
from kernels.losses.paper import attention_score_mse_paper, hidden_mse_paper, soft_cross_entropy_paper
from kernels.reference import losses as losses_reference

EXACT = ("dense", "tiled", "gram")
LENGTHS = [[7], [5, 1], [45, 0, 13], [67, 2], [130]]


def prefix_mask(lengths: list[int], size: int | None = None) -> torch.Tensor:
    size = size or max(lengths)
    return torch.arange(size)[None, :] < torch.tensor(lengths)[:, None]


def make_qk(lengths, heads, d_s, d_t, dtype=torch.float64, seed=0, size=None):
    generator = torch.Generator().manual_seed(seed)
    mask = prefix_mask(lengths, size)
    shape = (len(lengths), heads, mask.shape[1])
    student = [torch.randn(*shape, d_s, generator=generator, dtype=torch.float64).to(dtype) for _ in "qk"]
    teacher = [torch.randn(*shape, d_t, generator=generator, dtype=torch.float64).to(dtype) for _ in "qk"]
    return [x.requires_grad_() for x in student], teacher, mask


def attention_by_loops(q_s, k_s, q_t, k_t, mask, scale_s=None, scale_t=None):
    """Real tokens picked out one sequence and one head at a time, float64."""
    scale_s = q_s.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[-1] ** -0.5 if scale_t is None else scale_t
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for b in range(q_s.shape[0]):
        real = mask[b].nonzero().squeeze(-1)
        for h in range(q_s.shape[1]):
            student = q_s[b, h, real].double() @ k_s[b, h, real].double().T * scale_s
            teacher = q_t[b, h, real].double() @ k_t[b, h, real].double().T * scale_t
            total = total + (student - teacher).square().sum()
            pairs += len(real) ** 2
    return total / pairs


@pytest.mark.parametrize("method", [*EXACT, "auto"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("d_s", "d_t"), [(4, 4), (5, 3), (1, 45)])
def test_attention_score_mse_and_gradients_equal_loops(method, lengths, d_s, d_t):
    student, teacher, mask = make_qk(lengths, 3, d_s, d_t)
    expected = attention_by_loops(*student, *teacher, mask)
    expected_grads = torch.autograd.grad(expected, student)
    loss = attention_score_mse(*student, *teacher, mask, method=method, tile=16)
    # float64 throughout: only the order of summation differs (about 1e-16 x number of terms)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    for grad, reference in zip(torch.autograd.grad(loss, student), expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", EXACT)
def test_attention_score_mse_scales(method):
    student, teacher, mask = make_qk([9, 4], 2, 5, 3)
    loss = attention_score_mse(*student, *teacher, mask, scale_s=1.0, scale_t=0.25, method=method)
    torch.testing.assert_close(loss, attention_by_loops(*student, *teacher, mask, 1.0, 0.25), rtol=1e-11, atol=0)


@pytest.mark.parametrize("method", EXACT)
def test_attention_score_mse_gradcheck(method):
    student, teacher, mask = make_qk([6, 3, 0], 2, 3, 4, size=7)
    assert torch.autograd.gradcheck(
        lambda q, k: attention_score_mse(q, k, *teacher, mask, method=method, tile=4), student
    )


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("lengths", [[45, 0, 13], [130, 77]], ids=str)
def test_attention_score_mse_in_float32(method, lengths):
    student, teacher, mask = make_qk(lengths, 4, 45, 32, dtype=torch.float32)
    expected = attention_by_loops(*student, *teacher, mask)
    reference_grads = torch.autograd.grad(expected, student)
    loss = attention_score_mse(*student, *teacher, mask, method=method)
    assert loss.dtype == torch.float32
    # scores carry about 45 roundings of 6e-8; the mean of squares averages most of it away
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    for grad, reference in zip(torch.autograd.grad(loss, student), reference_grads, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())


@pytest.mark.parametrize("method", [*EXACT, "auto"])
def test_padding_never_matters(method):
    student, teacher, mask = make_qk([40, 0, 71], 2, 4, 5)
    clean = attention_score_mse(*student, *teacher, mask, method=method)
    clean_grads = torch.autograd.grad(clean, student)
    holes = ~mask[:, None, :, None]
    dirty_student = [x.detach().masked_fill(holes, float("nan")).requires_grad_() for x in student]
    dirty_teacher = [x.masked_fill(holes, float("nan")) for x in teacher]
    dirty = attention_score_mse(*dirty_student, *dirty_teacher, mask, method=method)
    assert torch.equal(dirty, clean)
    for grad, reference in zip(torch.autograd.grad(dirty, dirty_student), clean_grads, strict=True):
        assert torch.equal(grad, reference)


@pytest.mark.parametrize("method", [*EXACT, "auto"])
def test_no_real_token_gives_zero_loss_and_zero_gradient(method):
    student, teacher, mask = make_qk([0, 0], 2, 4, 4, size=70)
    loss = attention_score_mse(*student, *teacher, mask, method=method)
    grads = torch.autograd.grad(loss, student)
    assert loss.item() == 0.0
    assert all(g.abs().max() == 0 for g in grads)


@pytest.mark.parametrize("method", EXACT)
def test_teacher_gets_no_gradient(method):
    student, teacher, mask = make_qk([6], 2, 4, 4)
    teacher = [x.requires_grad_() for x in teacher]
    attention_score_mse(*student, *teacher, mask, method=method).backward()
    assert all(x.grad is None for x in teacher)
    assert all(x.grad is not None for x in student)


@pytest.mark.parametrize("method", ["tiled", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["cpu-kernels", "reference"])
def test_nothing_of_size_s_squared_is_saved(method, dtype):
    student, teacher, mask = make_qk([256], 1, 4, 4, dtype=dtype)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        attention_score_mse(*student, *teacher, mask, method=method)
    assert saved
    assert max(saved) <= 256 * 4


def test_tiled_runs_under_autocast_in_float32():
    student, teacher, mask = make_qk([70], 2, 8, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention_score_mse(*student, *teacher, mask, method="tiled")
    assert loss.dtype == torch.float32
    # bf16 inputs are taken as they are; all arithmetic is fp32 (2 x 8 products a score)
    torch.testing.assert_close(loss.double(), attention_by_loops(*student, *teacher, mask), rtol=1e-6, atol=0)
    loss.backward()
    assert student[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
def test_gram_bound_holds_and_auto_is_within_a_thousandth(noise):
    """As the student approaches the teacher the Gram form cancels: its bound covers the error, `auto` avoids it."""
    _, teacher, mask = make_qk([210], 2, 3, 30, seed=3)
    generator = torch.Generator().manual_seed(4)
    student = [x + noise * torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in teacher]
    true = attention_score_mse(*student, *teacher, mask, scale_s=1.0, scale_t=1.0, method="dense")
    gram = attention_score_mse(*student, *teacher, mask, scale_s=1.0, scale_t=1.0, method="gram")
    pairs = 2 * 210**2
    assert (gram - true).abs() * pairs <= gram_error_bound(*student, *teacher)
    auto = attention_score_mse(*student, *teacher, mask, scale_s=1.0, scale_t=1.0)
    assert (auto - true).abs() <= 1e-3 * true


def test_auto_of_the_reference_takes_each_form_where_it_should(monkeypatch):
    taken = []
    gram, tiled = losses_reference._gram_sum, losses_reference._tiled_sum
    monkeypatch.setattr(losses_reference, "_gram_sum", lambda *a: taken.append("gram") or gram(*a))
    monkeypatch.setattr(losses_reference, "_tiled_sum", lambda *a: taken.append(a[4]) or tiled(*a))
    for length, width, expected in [(64, 16, [64]), (65, 32, [TILE]), (100, 4, ["gram"])]:
        student, teacher, mask = make_qk([length], 1, width, width)
        taken.clear()
        attention_score_mse(*student, *teacher, mask)
        assert taken == expected
    taken.clear()
    equal = [x.detach() for x in student]
    assert attention_score_mse(*equal, *equal, mask).item() == 0.0
    assert taken == ["gram", TILE]  # tried, not proven accurate, replaced


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.update(q_t=a["q_t"][:, :2], k_t=a["k_t"][:, :2]), ["3 heads", "teacher 2"]),
        (lambda a: a.update(k_s=a["k_s"][..., :2]), ["student", "(1, 3, 6, 2)"]),
        (lambda a: a.update(mask=a["mask"].long()), ["boolean", "int64"]),
        (lambda a: a.update(mask=a["mask"][:, :4]), ["(1, 4)"]),
        (lambda a: a.update(method="exact"), ["'exact'", "gram"]),
        (lambda a: a.update(tile=0), ["tile"]),
    ],
    ids=["heads", "key-shape", "mask-dtype", "mask-shape", "method", "tile"],
)
def test_attention_score_mse_names_what_is_wrong(change, words):
    (q_s, k_s), (q_t, k_t), mask = make_qk([6], 3, 4, 4)
    arguments = {"q_s": q_s, "k_s": k_s, "q_t": q_t, "k_t": k_t, "mask": mask}
    change(arguments)
    with pytest.raises(ValueError) as error:
        attention_score_mse(**arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("lengths", [[7], [5, 0, 1], [45, 13]], ids=str)
@pytest.mark.parametrize(("h_s", "h_t"), [(1, 7), (45, 32), (7, 7)])
def test_hidden_mse_and_gradients_equal_loops(lengths, h_s, h_t):
    generator = torch.Generator().manual_seed(1)
    mask = prefix_mask(lengths)
    student = torch.randn(*mask.shape, h_s, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(*mask.shape, h_t, generator=generator, dtype=torch.float64, requires_grad=True)
    fit = torch.nn.Linear(h_s, h_t).double()
    inputs = (student, fit.weight, fit.bias)
    rows = student[mask] @ fit.weight.T + fit.bias - teacher.detach()[mask]
    expected = rows.square().sum() / (sum(lengths) * h_t)
    loss = hidden_mse(student, fit.weight, fit.bias, teacher, mask)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for grad, reference in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda *a: hidden_mse(*a, teacher.detach(), mask), inputs, fast_mode=True)


def test_hidden_mse_identity_masks_and_zero_tokens():
    x = torch.randn(2, 5, 3)
    teacher = torch.randn(2, 5, 3)
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    assert hidden_mse(x, None, None, teacher, nothing).item() == 0.0
    everything = ~nothing
    torch.testing.assert_close(hidden_mse(x, None, None, teacher, everything), F.mse_loss(x, teacher))
    teacher[0, 3:] = float("nan")
    mask = prefix_mask([3, 5])
    assert torch.isfinite(hidden_mse(x, None, None, teacher, mask))
    with pytest.raises(ValueError, match="3 wide after projection, teacher's 4"):
        hidden_mse(x, None, None, torch.randn(2, 5, 4), mask)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rows", [1, 7])
def test_soft_cross_entropy_equals_torch_and_its_gradient(temperature, rows):
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = F.cross_entropy(student / temperature, (teacher.detach() / temperature).softmax(-1)) * temperature**2
    loss = soft_cross_entropy(student, teacher, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    # d/ds = T (p_s - p_t) / rows
    (grad,) = torch.autograd.grad(loss, student)
    difference = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    torch.testing.assert_close(grad, temperature * difference.detach() / rows, rtol=1e-10, atol=1e-14)


def test_soft_cross_entropy_edge_cases():
    assert soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3)).item() == 0.0
    extreme = soft_cross_entropy(torch.tensor([[1e4, -1e4]]), torch.tensor([[1e4, -1e4]]))
    assert extreme.item() == 0.0
    with pytest.raises(ValueError, match="temperature must be > 0"):
        soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), 0.0)
    with pytest.raises(ValueError, match=r"\(1, 2\), teacher \(1, 3\)"):
        soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 3))


def test_published_attention_arithmetic_by_hand():
    student, teacher, mask = make_qk([3, 2], 2, 4, 4, dtype=torch.float32, seed=5)
    q_s = student[0].detach().clone()
    q_s[0, 0, 0] = -500 * student[1].detach()[0, 0, 0]  # a real score far below -100: the published code drops it
    loss = attention_score_mse_paper(q_s, student[1], *teacher, mask)
    total, count = 0.0, 0
    for b in range(2):
        for h in range(2):
            for i in range(3):  # padded rows count
                for j in range(3):
                    pair = []
                    for q, k in ((q_s, student[1]), teacher):
                        score = float(q[b, h, i].detach() @ k[b, h, j].detach()) / math.sqrt(4) + (
                            0.0 if mask[b, j] else -10000.0
                        )
                        pair.append(0.0 if score <= -100 else score)
                    total += (pair[0] - pair[1]) ** 2
                    count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)  # fp32 scores up to a few hundred


def test_published_arithmetic_equals_ours_where_it_is_right():
    """Without padding and without scores <= -100 the two differ only by soft CE's factor classes / T²."""
    student, teacher, mask = make_qk([6, 6], 2, 4, 4, dtype=torch.float32)
    torch.testing.assert_close(
        attention_score_mse_paper(*student, *teacher, mask), attention_score_mse(*student, *teacher, mask)
    )
    x, y = torch.randn(2, 6, 3), torch.randn(2, 6, 3)
    torch.testing.assert_close(hidden_mse_paper(x, None, None, y), hidden_mse(x, None, None, y, mask))
    torch.testing.assert_close(soft_cross_entropy_paper(x[0], y[0], 2.0) * 3 * 4.0, soft_cross_entropy(x[0], y[0], 2.0))
