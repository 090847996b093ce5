"""The score loss computed inside the student's attention: the same terms and gradients as apart from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import Batch, TaskSpec
from engine.distill import Distiller
from engine.errors import UserError
from engine.objective import KDWeights, kd_loss
from engine.states import EncoderStates
from engine.student import FFNASConfig, FFNASForSequenceClassification, attention
from kernels.language.expression import parse_expression

GELU = parse_expression("linear(gelu(linear(x,wb1)),wb2)")
RELU = parse_expression("tanh(linear(relu(mul(linear(x,wb1),x)),wb2))")
SPEC = TaskSpec("t", "classification", ("text",), "label", ("a", "b", "c"))
FULL = Architecture(tuple(LayerSpec(e, 2, "1") for e in (GELU, RELU, GELU)))
SUBNETS = [
    Architecture((LayerSpec(GELU, 1, "1/2"), LayerSpec(RELU, 2, "1"), LayerSpec(GELU, 2, "1/3"))),
    Architecture((LayerSpec(GELU, 1, "1/2"), LayerSpec(RELU, 1, "1"), LayerSpec(GELU, 1, "1"))),
    Architecture((LayerSpec(RELU, 1, "1"), LayerSpec(RELU, 1, "1"), LayerSpec(GELU, 1, "1"))),
]


class FixedTeacher:
    """Answers drawn once: [B, 3 heads, S, d_t = 5]."""

    num_layers = 3

    def __init__(self, batch: Batch, heads: int = 3) -> None:
        g = torch.Generator().manual_seed(3)
        rows, length = batch.input_ids.shape

        def draw(*shape):
            return torch.randn(*shape, generator=g)

        self.answer = EncoderStates(
            draw(rows, length, 8),
            tuple(draw(rows, length, 8) for _ in range(3)),
            tuple(draw(rows, heads, length, 5) for _ in range(3)),
            tuple(draw(rows, heads, length, 5) for _ in range(3)),
            draw(rows, 3),
        )

    def states(self, batch, layers, *, need_logits, bf16):
        return self.answer if need_logits else replace(self.answer, logits=None)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(9)[None] < torch.tensor([[9], [4], [1], [0]])
    ids = torch.randint(1, 40, (4, 9), generator=g) * mask
    return Batch(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids), labels=None)


def make(p_drop=0.0):
    torch.manual_seed(0)
    config = FFNASConfig(
        vocab_size=40, hidden_size=12, intermediate_size=12, num_hidden_layers=3, num_attention_heads=3,
        embedding_type="trigram", embedding_size=6, layers=FULL, teacher_hidden_size=8, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=p_drop, max_position_embeddings=16,
    )  # fmt: skip
    return FFNASForSequenceClassification(config).train()


def distiller(batch, precision="fp32", **weights):
    return Distiller(FixedTeacher(batch), 3, KDWeights(**weights), SPEC, torch.device("cpu"), precision)  # type: ignore[arg-type]


def terms_and_gradients(model, run):
    model.zero_grad(set_to_none=True)
    loss = run()
    loss.total.backward()
    terms = torch.stack([loss.total, loss.hidden, loss.attention, loss.prediction]).detach()
    return terms, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, apart, rtol, atol):
    torch.testing.assert_close(ours[0], apart[0], rtol=rtol, atol=atol)
    assert ours[1].keys() == apart[1].keys()
    for name, gradient in ours[1].items():
        expected = apart[1][name]
        assert (gradient - expected).norm() <= 10 * rtol * expected.norm() + atol, name


@pytest.fixture
def calls(monkeypatch):
    """How often attention computed a score loss."""
    seen = []
    fused = attention.fused_attention

    def count(*args, **options):
        seen.append(options.get("teacher") is not None)
        return fused(*args, **options)

    monkeypatch.setattr(attention, "fused_attention", count)
    return seen


# float32: sums in another order. bf16: teachers are float32 here, so attention stays apart unless they are rounded too
@pytest.mark.parametrize("task", [False, True], ids=["text", "task"])
def test_one_student_equals_the_losses_apart(batch, task, calls, monkeypatch):
    model, kd = make(), distiller(batch, temperature=2.0)
    run = kd.task_loss if task else kd.text_loss
    ours = terms_and_gradients(model, lambda: run(model, batch, architecture=SUBNETS[0]))
    assert calls == [True] * 3
    monkeypatch.setattr(attention, "one_pass_pays", lambda *_: False)
    apart = terms_and_gradients(model, lambda: run(model, batch, architecture=SUBNETS[0]))
    assert len(calls) == 3
    assert_same(ours, apart, rtol=2e-5, atol=1e-7)


def test_bfloat16_equals_the_losses_apart(batch, calls, monkeypatch):
    model, kd = make(), distiller(batch, "bf16")
    low = kd.teacher.answer
    kd.teacher.answer = replace(
        low, queries=tuple(q.bfloat16() for q in low.queries), keys=tuple(k.bfloat16() for k in low.keys)
    )
    ours = terms_and_gradients(model, lambda: kd.text_loss(model, batch))
    assert calls == [True] * 3
    monkeypatch.setattr(attention, "one_pass_pays", lambda *_: False)
    apart = terms_and_gradients(model, lambda: kd.text_loss(model, batch))
    assert_same(ours, apart, rtol=2e-2, atol=1e-3)  # a rounding is 4e-3; apart, scaled queries are rounded once more


@pytest.mark.parametrize("average", [True, False])
def test_subnets_in_one_pass_equal_single_ones(batch, average, calls):
    """Those that share a prefix share its loss; each counts it."""
    model, kd = make(), distiller(batch)
    mixed = terms_and_gradients(model, lambda: kd.mixed_loss(model, batch, SUBNETS, task=True, average=average))
    assert calls == [True] * (1 + 2 + 3)  # distinct prefixes before each layer
    share = 1 / len(SUBNETS) if average else 1.0
    terms, gradients = torch.zeros(4), {}
    for subnet in SUBNETS:
        own, grads = terms_and_gradients(model, lambda s=subnet: kd.task_loss(model, batch, architecture=s))
        terms += share * own
        for name, g in grads.items():
            gradients[name] = gradients.get(name, 0) + share * g
    assert_same(mixed, (terms, gradients), rtol=2e-5, atol=1e-6)


def test_it_survives_gradient_checkpointing(batch, calls):
    model, kd = make(p_drop=0.1), distiller(batch)
    torch.manual_seed(5)
    plain = terms_and_gradients(model, lambda: kd.text_loss(model, batch))
    for options in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        torch.manual_seed(5)
        again = terms_and_gradients(model, lambda: kd.text_loss(model, batch))
        assert_same(again, plain, rtol=1e-5, atol=1e-7)
    assert all(calls)


def test_where_it_is_left_apart(batch, calls):
    """paper_exact, a weight of 0, other attention functions, other numbers of heads, no queries asked for."""
    model = make()
    assert distiller(batch, paper_exact=True).text_loss(model, batch).attention > 0
    assert distiller(batch, attention=0.0).text_loss(model, batch).attention == 0
    model.set_attn_implementation("eager")
    assert distiller(batch).text_loss(model, batch).attention > 0
    model.set_attn_implementation("sdpa")
    assert not any(calls)
    kd = distiller(batch)
    kd.teacher = FixedTeacher(batch, heads=2)
    with pytest.raises(UserError, match="the student has 3, the teacher 2"):
        kd.text_loss(model, batch)
    short = [(q, q) for q in FixedTeacher(batch).answer.queries[:2]]
    with pytest.raises(UserError, match="records 3 layers, the teacher gave queries and keys of 2"):
        model.states(batch.input_ids, batch.attention_mask, score_targets=short)


def test_nothing_of_size_s_squared_and_no_scaled_queries_are_kept(batch):
    """What backward keeps of attention: q, k, v, context, one number per row, the teacher's."""
    config = FFNASConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "sdpa"
    block = attention.FFNASAttention(config, 0)
    x, teacher = torch.randn(1, 200, 16), (torch.randn(1, 2, 200, 70), torch.randn(1, 2, 200, 70))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        *_, losses = block(x, None, teacher)
    assert losses.shape == (1,)
    assert max(saved) == teacher[0].numel() < 2 * 200**2


def test_a_score_loss_is_no_paper_exact_term(batch):
    states = replace(FixedTeacher(batch).answer, score_loss=torch.ones(()))
    arguments = {"fit_dense": None, "terms": ("attention",)}
    assert kd_loss(states, states, batch.mask, weights=KDWeights(), **arguments).attention == 1
    with pytest.raises(ValueError, match="paper_exact"):
        kd_loss(states, states, batch.mask, weights=KDWeights(paper_exact=True), **arguments)
