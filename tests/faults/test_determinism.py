"""The statements of docs/determinism.md that can be checked on this machine."""

import math

import pytest
import torch
from torch import nn

from engine.exhaustion import is_out_of_memory
from engine.objective import KDLoss
from engine.training.optim import build_optimizer, clipped_step
from engine.training.sentinel import Sentinel
from kernels import dispatch, fused_ffn, use_backend
from kernels.dispatch import load_backend

EXPRESSIONS = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "add(x,linear(relu(mul(linear(x,wb1),x)),wb2))",
    "max(linear(tanh(x),wb1),linear(swish(x),wb2))",
)
BACKENDS = [("reference", "cpu"), ("cpu", "cpu")]
if torch.cuda.is_available():
    BACKENDS += [("triton", "cuda"), ("cuda", "cuda")]


def outputs(backend, device, expression, dtype, dropout=0.1):
    g = torch.Generator().manual_seed(5)
    hidden = 45
    inner = hidden if expression.startswith("max(linear") else 22
    shapes = [(301, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,)]
    tensors = [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]
    seed = torch.tensor([77], device=device)
    with use_backend(backend):
        out = fused_ffn(*tensors, expression, p_drop=dropout, seed=seed)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
    return [out.detach(), *gradients]


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_op_repeats_its_bits(backend, device, dtype):
    if isinstance(load_backend(backend), str):
        pytest.skip(str(load_backend(backend)))
    for expression in EXPRESSIONS:
        first = outputs(backend, device, expression, dtype)
        for _ in range(3):
            again = outputs(backend, device, expression, dtype)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), expression


def test_a_step_with_an_overflowed_gradient_changes_nothing():
    for fused in (True, False):
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(model, lr=0.1)
        if not fused:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        skipped = []
        states = []
        for factor in (1.0, math.inf, math.nan, 1.0):
            optimizer.zero_grad()
            (model(torch.ones(1, 3)).sum() * factor).backward()
            skipped.append(float(clipped_step(optimizer, list(model.parameters()), 1.0)))
            moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
            states.append([p.detach().clone() for p in model.parameters()] + moments)
        assert skipped == [0.0, 1.0, 1.0, 0.0]
        assert all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
        assert not torch.equal(states[2][0], states[3][0])
        assert all(t.isfinite().all() for t in states[3])


def test_the_guarded_step_is_adamw_bit_for_bit():
    torch.manual_seed(0)
    models = [nn.Linear(7, 5), nn.Linear(7, 5)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [build_optimizer(m, lr=0.1) for m in models]
    x = torch.randn(20, 7)
    for _ in range(5):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        clipped_step(optimizers[0], list(models[0].parameters()), 1.0)
        nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
        optimizers[1].step()
    assert torch.equal(models[0].weight, models[1].weight)


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        for name, shape in {"w1": (8, 16), "b1": (8,), "w2": (16, 8), "b2": (16,), "g": (16,), "b": (16,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / 4))

    def forward(self, x):
        return fused_ffn(x, self.w1, self.b1, self.w2, self.b2, self.g, self.b, EXPRESSIONS[0], p_drop=0.2)


@pytest.fixture
def kept_backends():
    """Backends as they were before."""
    load_backend("cpu")
    before = dict(dispatch._loaded)
    yield
    dispatch._loaded.clear()
    dispatch._loaded.update(before)


def kd(model):
    def loss():
        value = model(torch.ones(5, 16)).square().mean()
        return KDLoss.of(value, hidden=value)

    return loss


def test_the_sentinel_agrees_with_right_kernels_and_disturbs_nothing(kept_backends):
    notes, model = [], Student()
    state = torch.get_rng_state()
    assert Sentinel(torch.device("cpu"), "fp32", notes.append).training("warm-up", model, kd(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert notes == []


@pytest.mark.parametrize("harm", ["forward", "backward", "nan"])
def test_the_sentinel_takes_wrong_kernels_out_of_service(kept_backends, monkeypatch, harm):
    if isinstance(load_backend("cpu"), str):
        pytest.skip("no compiler here")
    from kernels.backends.cpu import CpuBackend

    inner = getattr(CpuBackend, "backward" if harm == "backward" else "forward")

    def wrong(self, *args, **options):
        answer = inner(self, *args, **options)
        if harm == "backward":
            return [g * 1.2 for g in answer]
        out, saved = answer
        return (out * 1.01 if harm == "forward" else out.fill_(math.nan)), saved

    monkeypatch.setattr(CpuBackend, "backward" if harm == "backward" else "forward", wrong)
    notes, model = [], Student()
    sentinel = Sentinel(torch.device("cpu"), "fp32", notes.append)
    assert not sentinel.training("warm-up", model, kd(model))
    assert len(notes) == 1
    assert "backend 'cpu' disagrees with the reference in warm-up" in notes[0]
    assert load_backend("cpu") == "its results differ from the reference's on this machine"
    assert sentinel.training("warm-up", model, kd(model))  # the reference with itself


def test_lack_of_memory_is_known_by_all_its_names():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("ffnas cpu backend: out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied (out of memory of man)"))
