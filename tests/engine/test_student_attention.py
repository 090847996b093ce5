"""The student's attention in bfloat16 on a CPU: the fused kernels in place of sdpa, with the same results."""

from __future__ import annotations

import pytest
import torch

from engine.student import attention
from engine.student.attention import FFNASAttention, extended_mask
from engine.student.configuration import FFNASConfig


@pytest.fixture
def block():
    torch.manual_seed(0)
    config = FFNASConfig(hidden_size=90, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    return FFNASAttention(config, 0).eval()


def run(block, x, mask, dtype):
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        out, query, key, probabilities, losses = block(x, extended_mask(block.config, x, mask))
    assert probabilities is None
    assert losses is None
    assert query.shape == key.shape == (3, 2, 33, 45)
    real = out if mask is None else out[mask]
    return real.float(), torch.autograd.grad(real.float().cos().sum(), x)[0]


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask", "padded"])
def test_bfloat16_takes_the_fused_kernels_and_agrees_with_float32(block, masked, monkeypatch):
    calls = []
    fused = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda *a, **k: calls.append(a[3]) or fused(*a, **k))
    x = torch.randn(3, 33, 90)
    mask = torch.arange(33)[None] < torch.tensor([33, 20, 1])[:, None] if masked else None
    expected, expected_grad = run(block, x, mask, torch.float32)
    assert not calls
    out, grad = run(block, x, mask, torch.bfloat16)
    assert len(calls) == 1
    assert calls[0].shape == (3, 33)
    # bf16 rounds projections, context and output to 2^-9 of values around 1
    torch.testing.assert_close(out, expected, rtol=0, atol=5e-2)
    assert (grad - expected_grad).norm() < 3e-2 * expected_grad.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_inference_takes_the_fused_linear_layers_and_agrees(block, dtype, monkeypatch):
    calls = []
    for name in ("fused_linears", "fused_linear_norm"):
        fused = getattr(attention, name)
        record = lambda *a, fused=fused, name=name, **k: calls.append(name) or fused(*a, **k)  # noqa: E731
        monkeypatch.setattr(attention, name, record)
    block = block.to(dtype)
    x = torch.randn(3, 33, 90, dtype=dtype)
    expected = block(x, None)[0]
    assert not calls
    with torch.inference_mode():
        out = block(x, None)[0]
    assert calls == ["fused_linears", "fused_linear_norm"]
    # outputs of LayerNorm, around 1: a few roundings
    close = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=close)


def test_replaced_hooked_and_few_are_left_to_their_layers(block):
    x = torch.randn(3, 33, 90)
    with torch.no_grad():
        assert attention.runs_fused(x, block.query, block.dense)
        assert not attention.runs_fused(x[:, :4], block.query)
        assert not attention.runs_fused(x.double(), block.query)
        assert not attention.runs_fused(x, torch.nn.Sequential(block.query))
        block.key.register_forward_hook(lambda *_: None)
        assert not attention.runs_fused(x, block.query, block.key)
    assert not attention.runs_fused(x, block.query)


def test_other_attention_functions_and_masks_are_left_alone(block):
    query = torch.zeros(1, 2, 4, 45, dtype=torch.bfloat16)
    assert attention.is_fused(block.config, query, None)
    assert not attention.is_fused(block.config, query.float(), None)
    assert not attention.is_fused(block.config, query, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    block.config._attn_implementation = "eager"
    assert not attention.is_fused(block.config, query, None)


def test_dropout_is_drawn_from_torchs_generator(block):
    block.train()
    block.p_drop, block.dropout.p = 0.5, 0.0
    x = torch.randn(3, 33, 90)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(run(block, x, None, torch.bfloat16)[0])
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
