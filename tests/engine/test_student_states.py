"""What distillation and other callers get out of a forward pass: recording, attention dispatch, transforms."""

from __future__ import annotations

import pytest
import torch
from encoder_reference import TRUNCATE, architecture, batch, randomize, small_config
from torch.func import functional_call
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine.errors import UserError
from engine.student import (
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)

SUBNET = architecture([(TRUNCATE[1], 1, 2), (TRUNCATE[0], 2, 3), (TRUNCATE[3], 1, 1)])


def make(cls=FFNASForSequenceClassification, **changes):
    return randomize(cls(small_config(**changes)).double()).eval()


def test_chosen_layers_are_those_of_the_full_record():
    model = make()
    inputs = batch()
    every = model.states(*inputs, architecture=SUBNET)
    some = model.states(*inputs, architecture=SUBNET, layers=[0, 2])
    assert len(every.hidden) == 3
    assert torch.equal(some.embeddings, every.embeddings)
    assert torch.equal(some.logits, every.logits)
    for ours, theirs in ((some.hidden, every.hidden), (some.queries, every.queries), (some.keys, every.keys)):
        assert len(ours) == 2
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[2])
    assert every.queries[0].shape == (3, 3, 8, 5)


def test_no_layer_may_be_asked_for():
    assert make().states(*batch(), layers=[]).hidden == ()


def test_states_agree_with_the_ordinary_outputs():
    model = make(attn_implementation="eager")
    inputs = batch()
    out = model(*inputs, output_hidden_states=True, output_attentions=True)
    states = model.states(*inputs)
    assert len(out.hidden_states) == 4
    for ours, theirs in zip((states.embeddings, *states.hidden), out.hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(states.logits, out.logits)
    score = states.queries[1] @ states.keys[1].transpose(-1, -2)
    score = score.masked_fill(~inputs[1][:, None, None, :], -torch.inf)
    torch.testing.assert_close(out.attentions[1], score.softmax(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers", [[3], [-1]])
def test_a_layer_that_does_not_exist_is_refused(layers):
    with pytest.raises(UserError, match="layers 0 to 2"):
        make().states(*batch(), layers=layers)


def test_attentions_without_eager_are_refused():
    with pytest.raises(UserError, match="eager"):
        make()(*batch(), output_attentions=True)


def test_logits_are_recorded_where_a_head_gives_them():
    ids, mask, types = batch()
    inputs = (ids, mask, types)
    assert make(FFNASModel).states(*inputs).logits is None
    assert make(FFNASForMaskedLM).states(*inputs).logits is None
    assert make(FFNASForQuestionAnswering).states(*inputs).logits.shape == (3, 8, 2)
    choices = [value.reshape(1, 3, 8) for value in inputs]
    states = make(FFNASForMultipleChoice).states(*choices)
    assert states.logits.shape == (1, 3)
    assert states.hidden[0].shape == (3, 8, 15)


def test_sdpa_and_eager_agree():
    inputs = batch()
    real = inputs[1]
    sdpa, eager = make(), make(attn_implementation="eager")
    a, b = sdpa.states(*inputs).hidden[-1], eager.states(*inputs).hidden[-1]
    torch.testing.assert_close(a[real], b[real], rtol=1e-9, atol=1e-10)


def test_a_registered_attention_function_is_called_and_sees_the_padding():
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.layer_idx, tuple(query.shape), attention_mask, kwargs["scaling"]))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("ffnas_test_spy", spy)
    inputs = batch()
    got = make(attn_implementation="ffnas_test_spy")(*inputs).logits
    assert torch.equal(got, make()(*inputs).logits)
    assert [index for index, *_ in seen] == [0, 1, 2]
    assert seen[0][1] == (3, 3, 8, 5)
    assert torch.equal(seen[0][2], inputs[1][:, None, None, :])
    assert seen[0][3] == pytest.approx(5**-0.5)


def test_activation_checkpointing_changes_no_gradient():
    inputs = batch()
    gradients = []
    for enabled in (False, True):
        model = make(hidden_dropout_prob=0.2).train()
        if enabled:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        states = model.states(*inputs, architecture=SUBNET)
        loss = states.logits.square().sum() + sum(h.sum() for h in states.hidden) + states.queries[1].square().sum()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, plain in gradients[0].items():
        other = gradients[1][name]
        assert (plain is None) == (other is None)
        if plain is not None:
            torch.testing.assert_close(other, plain, rtol=1e-12, atol=1e-12, msg=name)


def test_functional_call_reaches_every_parameter_of_a_recorded_forward():
    model, other = make(), randomize(make(), seed=5)
    inputs = batch()
    swapped = functional_call(
        model, dict(other.named_parameters()), inputs, {"states_layers": (0, 1, 2), "architecture": SUBNET}
    ).states
    own = other.states(*inputs, architecture=SUBNET)
    assert torch.equal(swapped.logits, own.logits)
    assert torch.equal(swapped.queries[2], own.queries[2])


def test_torch_compile_needs_no_graph_break():
    model = make()
    inputs = batch()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*inputs).logits
        torch.testing.assert_close(compiled, model(*inputs).logits, rtol=1e-12, atol=1e-12)
