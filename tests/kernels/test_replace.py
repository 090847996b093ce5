"""replace_ffn on Hugging Face encoders: same outputs, same parameters, undone without a trace."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kernels.ffn.replace import replace_ffn

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "vocab_size": 99,
    "max_position_embeddings": 64,
}
FAMILIES = ("Bert", "Roberta", "Electra", "XLMRoberta", "Camembert")
ACTIVATIONS = {"gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "swish"}
IDS = torch.arange(14).reshape(2, 7) + 5
# float32 rounding of small layers: the fused op sums products in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def build(family="Bert", activation="gelu", **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, hidden_act=activation, **options)
    return getattr(transformers, f"{family}Model")(config).eval()


def run(model):
    return model(IDS).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_state_dict_stay(family):
    model = build(family)
    expected, before = run(model), {k: v.clone() for k, v in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    with replace_ffn(model) as replaced:
        assert replaced.count == 3
        assert replaced.names == [f"encoder.layer.{k}" for k in range(3)]
        torch.testing.assert_close(run(model), expected, **CLOSE)
        assert list(model.state_dict()) == list(before)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(parameters[name] is p for name, p in model.named_parameters())
    assert torch.equal(run(model), expected)
    assert all("feed_forward_chunk" not in layer.__dict__ for layer in model.encoder.layer)


@pytest.mark.parametrize(("activation", "operator"), ACTIVATIONS.items())
def test_the_activation_is_recognized(activation, operator):
    model = build(activation=activation)
    expected = run(model)
    replaced = replace_ffn(model)
    assert str(replaced.expressions[0]) == f"linear({operator}(linear(x,wb1)),wb2)"
    torch.testing.assert_close(run(model), expected, **CLOSE)


def test_gradients_stay():
    model = build()
    expected = torch.autograd.grad(run(model).square().sum(), list(model.encoder.parameters()))
    replace_ffn(model)
    gradients = torch.autograd.grad(run(model).square().sum(), list(model.encoder.parameters()))
    for own, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)  # sums of 14 tokens through three layers


def test_replacing_twice_is_replacing_once():
    model = build()
    expected = run(model)
    first = replace_ffn(model)
    second = replace_ffn(model)
    assert first.count == second.count == 3
    torch.testing.assert_close(run(model), expected, **CLOSE)
    second.undo()
    assert torch.equal(run(model), expected)
    first.undo()
    assert torch.equal(run(model), expected)


def test_another_expression_changes_the_function():
    model = build()
    expected = run(model)
    replaced = replace_ffn(model, "tanh(linear(relu(linear(x,wb1)),wb2))")
    assert not torch.allclose(run(model), expected, atol=1e-3)
    replaced.undo()


def test_dropout_follows_training_mode_and_manual_seed():
    model = build(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.0)
    replace_ffn(model)
    model.train()
    torch.manual_seed(1)
    first = run(model)
    torch.manual_seed(1)
    assert torch.equal(run(model), first)
    torch.manual_seed(2)
    assert not torch.equal(run(model), first)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_chunking_and_gradient_checkpointing():
    model = build(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.0, chunk_size_feed_forward=1)
    expected = run(model)
    replace_ffn(model)
    torch.testing.assert_close(run(model), expected, **CLOSE)
    model.train()
    torch.manual_seed(0)
    plain = torch.autograd.grad(run(model).sum(), list(model.encoder.parameters()))
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    run(model).sum().backward()
    for parameter, gradient in zip(model.encoder.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


def test_copies_and_pickles_are_independent():
    model = build()
    replace_ffn(model)
    expected = run(model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for layer in model.encoder.layer:
        nn.init.zeros_(layer.output.dense.weight)
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(thawed), expected)
    assert not torch.equal(run(model), expected)


def test_models_without_such_layers_are_refused_with_what_was_looked_for():
    with pytest.raises(ValueError, match=r"Sequential can be replaced: looked for layers with intermediate\.dense"):
        replace_ffn(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"near misses: encoder.layer.0 .*activation is none of the operator table"):
        replace_ffn(build(activation="quick_gelu"))


def test_layers_with_foreign_parts_are_left_alone():
    model = build()
    model.encoder.layer[1].output.dense = nn.Sequential(nn.Linear(56, 24))
    assert replace_ffn(model).names == ["encoder.layer.0", "encoder.layer.2"]
