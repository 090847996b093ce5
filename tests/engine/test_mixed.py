"""The mixed forward against single passes of every subnet: states, losses and gradients."""

import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import Batch
from engine.distill import mixed_states
from engine.student import FFNASConfig, FFNASForSequenceClassification
from kernels.language.expression import parse_expression

GELU = parse_expression("linear(gelu(linear(x,wb1)),wb2)")
RELU = parse_expression("tanh(linear(relu(mul(linear(x,wb1),x)),wb2))")


def architecture(*layers):
    return Architecture(tuple(LayerSpec(e, n, r) for e, n, r in layers))


FULL = architecture((GELU, 3, "1"), (RELU, 3, "1"), (GELU, 3, "1"))
SUBNETS = [
    architecture((GELU, 1, "1/2"), (RELU, 2, "1"), (GELU, 3, "1/3")),
    architecture((GELU, 1, "1/2"), (RELU, 2, "1"), (GELU, 1, "1")),
    architecture((GELU, 3, "1"), (RELU, 1, "1/4"), (GELU, 3, "1/3")),
    architecture((GELU, 1, "1/2"), (RELU, 2, "1"), (GELU, 3, "1/3")),
]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = FFNASConfig(
        vocab_size=40, hidden_size=12, intermediate_size=12, num_hidden_layers=3, num_attention_heads=3,
        embedding_type="trigram", embedding_size=6, layers=FULL, teacher_hidden_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=16,
    )  # fmt: skip
    return FFNASForSequenceClassification(config).train()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [1]])
    ids = torch.randint(1, 40, (3, 7), generator=g) * mask
    return Batch(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), labels=None)


def tensors(states):
    return [states.embeddings, *states.hidden, *states.queries, *states.keys, states.logits]


def total(all_states, batch):
    """A scalar in which everything takes part at real tokens."""
    mask = batch.attention_mask
    parts = []
    for k, states in enumerate(all_states):
        for j, t in enumerate(tensors(states)):
            real = t if t.shape[0] == t.numel() // t.shape[-1] else t[mask] if t.dim() == 3 else t.transpose(1, 2)[mask]
            parts.append(((k + 1) * (j + 1) * real).square().mean())
    return sum(parts)


def test_states_and_gradients_equal_single_passes(model, batch):
    single = [
        model.states(batch.input_ids, batch.attention_mask, batch.token_type_ids, architecture=a) for a in SUBNETS
    ]
    total(single, batch).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    mixed = mixed_states(model, batch, SUBNETS)
    mask = batch.attention_mask
    for ours, theirs in zip(mixed, single, strict=True):
        for a, b in zip(tensors(ours), tensors(theirs), strict=True):
            if a.dim() == 4:
                a, b = a.transpose(1, 2), b.transpose(1, 2)
            if a.dim() > 2:
                a, b = a[mask], b[mask]
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # a few float32 roundings over three layers
    total(mixed, batch).backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_shared_prefixes_run_once(model, batch, monkeypatch):
    rows = []
    for layer in model.ffnas.encoder:
        forward = layer.attention.forward
        monkeypatch.setattr(layer.attention, "forward", lambda x, m, f=forward: rows.append(x.shape[0]) or f(x, m))
    mixed_states(model, batch, SUBNETS)
    assert rows == [3, 6, 6]  # batch of 3: one prefix before layer 0, two before layers 1 and 2


def test_one_subnet_is_a_plain_pass(model, batch):
    (mixed,) = mixed_states(model, batch, SUBNETS[:1])
    plain = model.states(batch.input_ids, batch.attention_mask, batch.token_type_ids, architecture=SUBNETS[0])
    for a, b in zip(tensors(mixed), tensors(plain), strict=True):
        assert torch.equal(a, b)
