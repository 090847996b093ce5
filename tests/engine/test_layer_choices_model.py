"""Models and subnets whose layers have fewer heads, no FFN, or are left out, against a plain PyTorch encoder."""

from __future__ import annotations

import math

import pytest
import torch
from encoder_reference import FORMULAS, batch, embed, layer_norm, linear, parameters, randomize
from layer_choices import CHOICES, HEADS, INNER, SIZE, THREE_OF_FIVE, config, each_choice, spec, supernet

from engine.architecture.architecture import SKIP, Architecture
from engine.architecture.params import count_parameters
from engine.errors import UserError
from engine.student import (
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)
from engine.student.supernet import build_student, extract, inherit
from kernels.language.expression import GELU_FFN


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    """What is tested here are the layers, whose place the runtime would take."""
    monkeypatch.setenv("FFNAS_RUNTIME", "0")


def encode(p, config, architecture, ids, mask, types):
    """The outputs of all layers by the book; a layer that is left out hands on its input."""
    x, outputs = embed(p, config, ids, types), []
    for index, layer in enumerate(architecture.layers):
        name = f"encoder.{index}.attention"
        heads = HEADS if layer.heads is None else layer.heads
        added = 0.0
        for part in (slice(SIZE * head, SIZE * (head + 1)) for head in range(heads)):
            q, k, v = (
                x @ p[f"{name}.{w}.weight"][part].T + p[f"{name}.{w}.bias"][part] for w in ("query", "key", "value")
            )
            score = (q @ k.transpose(1, 2) / math.sqrt(SIZE)).masked_fill(~mask[:, None, :], -math.inf)
            added = added + torch.softmax(score, -1) @ v @ p[f"{name}.dense.weight"][:, part].T
        if heads:
            x = layer_norm(x + added + p[f"{name}.dense.bias"], p, f"{name}.layernorm", config.layer_norm_eps)
        inner = int(layer.ratio * INNER)
        for position in range(layer.stack):
            ffn = f"encoder.{index}.all_ffn.{position}"
            w1, b1 = p[f"{ffn}.dense1.weight"][:inner], p[f"{ffn}.dense1.bias"][:inner]
            w2, b2 = p[f"{ffn}.dense2.weight"][:, :inner], p[f"{ffn}.dense2.bias"]
            body = FORMULAS[str(layer.expression)](
                x, lambda a, w=w1, b=b1: a @ w.T + b, lambda a, w=w2, b=b2: a @ w.T + b
            )
            x = layer_norm(x + body, p, f"{ffn}.layernorm", config.layer_norm_eps)
        outputs.append(x)
    return outputs


def reference(model, architecture, ids, mask, types):
    """(outputs of all layers, logits) of a sequence classifier."""
    p = parameters(model)
    outputs = encode(p, model.config, architecture, ids, mask, types)
    pooled = torch.tanh(linear(outputs[-1][:, 0], p, "cls_pooler.dense"))
    return outputs, linear(pooled, p, "classifier")


@each_choice
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_subnet_is_what_the_book_says(choice, attention):
    model = supernet().double()
    model.set_attn_implementation(attention)
    inputs = batch(rows=4, length=9)
    outputs, logits = reference(model, choice, *inputs)
    out = model(*inputs, architecture=choice, output_hidden_states=True)
    torch.testing.assert_close(out.logits, logits)
    for own, wanted in zip(out.hidden_states[1:], outputs, strict=True):
        torch.testing.assert_close(own, wanted)


@each_choice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [8, 23], ids=["few tokens", "tokens enough for the fused layers"])
def test_an_extracted_model_computes_the_same(choice, dtype, length):
    model = supernet().to(dtype)
    own = extract(model, choice)
    kept = [index for index, layer in enumerate(choice.layers) if not layer.skipped]
    assert own.config.num_hidden_layers == len(own.ffnas.encoder) == len(kept)
    assert own.config.full_architecture == Architecture(tuple(choice.layers[index] for index in kept))
    assert own.config.source_layers == (None if len(kept) == 3 else kept)
    inputs = batch(rows=4, length=length)
    assert torch.equal(own(*inputs).logits, model(*inputs, architecture=choice).logits)
    with torch.no_grad():  # the last layer for the first token alone, fused linear layers
        short = own(*inputs).logits
        assert torch.equal(short, model(*inputs, architecture=choice).logits)
        rows = own(*inputs, output_hidden_states=True)
        assert torch.equal(rows.logits, model(*inputs, architecture=choice, output_hidden_states=True).logits)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float64: 1e-10}[dtype]  # rounding of two orders
    torch.testing.assert_close(short, rows.logits, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(short.double(), reference(model.double(), choice, *inputs)[1], atol=tolerance, rtol=0.1)


@each_choice
def test_gradients_reach_the_leading_parts_alone(choice):
    model, inputs = supernet().double(), batch()
    model(*inputs, architecture=choice).logits.square().sum().backward()
    own = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    reference(model, choice, *inputs)[1].square().sum().backward()
    for name, p in model.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(torch.zeros_like(p) if own[name] is None else own[name], wanted, msg=name)
    for index, layer in enumerate(choice.layers):
        attention = model.ffnas.encoder[index].attention
        rows = SIZE * (HEADS if layer.heads is None else layer.heads)
        for part in (own[f"ffnas.encoder.{index}.attention.{n}.weight"] for n in ("query", "key", "value")):
            assert part is None or part[rows:].count_nonzero() == 0
            assert rows == 0 or part[:rows].abs().sum(1).min() > 0
        dense = own[f"ffnas.encoder.{index}.attention.dense.weight"]
        assert (dense is None) == (rows == 0)
        assert dense is None or dense[:, rows:].count_nonzero() == 0
        assert attention.num_heads == HEADS


def test_the_formula_counts_what_is_extracted():
    model = supernet(FFNASModel)
    for choice in CHOICES.values():
        own = extract(model, choice)
        stored = sum(p.numel() for name, p in own.named_parameters() if "cls_pooler" not in name)
        assert stored == count_parameters(choice, model.config.shape)
        assert stored == count_parameters(own.config.full_architecture, own.config.shape)


@pytest.mark.parametrize(
    "cls", [FFNASModel, FFNASForMaskedLM, FFNASForQuestionAnswering, FFNASForMultipleChoice], ids=lambda c: c.__name__
)
def test_every_class_can_be_pruned(cls):
    model, inputs = supernet(cls), [t[:, :8] for t in batch()]
    for choice in CHOICES.values():
        torch.testing.assert_close(extract(model, choice)(*inputs)[0], model(*inputs, architecture=choice)[0])


@each_choice
def test_a_pruned_model_is_saved_trained_and_pruned_again(choice, tmp_path):
    model = extract(supernet(), choice)
    model.save_pretrained(tmp_path)
    again = FFNASForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = batch()
    assert again.config.full_architecture == model.config.full_architecture
    assert again.config.source_layers == model.config.source_layers
    assert torch.equal(again(*inputs).logits, model(*inputs).logits)
    again.train().gradient_checkpointing_enable()
    again(*inputs, labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(p.grad is not None for name, p in again.named_parameters())


def test_what_was_pruned_is_pruned_further():
    model, inputs = supernet(), batch()
    first = Architecture((SKIP, spec(2, "3/4", 4), spec(1, 1, 3)))
    second = Architecture((spec(1, "3/8", 2), SKIP))
    whole = Architecture((SKIP, spec(1, "3/8", 2), SKIP))
    once = extract(model, first)
    twice = extract(once, second)
    assert twice.config.source_layers == [1]
    logits = model(*inputs, architecture=whole).logits
    torch.testing.assert_close(once(*inputs, architecture=second).logits, logits)
    assert torch.equal(twice(*inputs).logits, logits)
    with pytest.raises(UserError, match=r"layers\[0\]: number of heads 5 is more than the 4 this model stores"):
        once(*inputs, architecture=Architecture((spec(1, "3/8"), SKIP)))


@each_choice
def test_a_pruned_model_inherits_from_the_supernet(choice):
    model = supernet()
    own = randomize(extract(model, choice), seed=1)
    assert inherit(own, model) == []
    inputs = batch()
    assert torch.equal(own(*inputs).logits, model(*inputs, architecture=choice).logits)


def test_inheriting_from_another_number_of_heads_or_from_too_few_layers_is_refused():
    own = extract(supernet(), THREE_OF_FIVE)
    with pytest.raises(UserError, match="heads are 5 wide in the supernet and 7 in the model"):
        inherit(own, supernet(num_attention_heads=7))
    last = extract(supernet(), Architecture((SKIP, SKIP, spec(1))))
    with pytest.raises(UserError, match=r"stores no encoder\.2; use a supernet with more layers"):
        inherit(last, supernet(num_hidden_layers=2, layers=Architecture((spec(2),) * 2)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((SKIP,) * 3, "layers: every layer is left out"),
        ((spec(1, heads=6), *[spec(1)] * 2), r"layers\[0\]\.heads: 6 are more than the model's 5 num_attention_heads"),
        ((spec(3, heads=2), *[spec(1)] * 2), r"layers\[0\]: stack 3 is more than the 2"),
    ],
)
def test_what_a_model_cannot_run_is_refused(layers, message):
    with pytest.raises(UserError, match=message):
        supernet()(*batch(), architecture=Architecture(layers))
    if "stack" not in message:
        with pytest.raises(UserError, match=message):
            config(layers=Architecture(layers))


@pytest.mark.parametrize("value", [[0], [0, 1, 1], [2, 1, 0], [0, 1, -1], [0, 1, "2"], 3, [0, 1, True]])
def test_source_layers_are_checked(value):
    with pytest.raises(UserError, match="source_layers: must be 3 layer numbers in rising order"):
        config(source_layers=value)
    assert config(source_layers=[0, 4, 11]).source_layers == [0, 4, 11]


def test_heads_are_not_cut_from_layers_that_were_replaced():
    model = supernet()
    model.ffnas.encoder[1].attention.value = torch.nn.Sequential(model.ffnas.encoder[1].attention.value)
    with pytest.raises(UserError, match=r"heads: 3 of 5 heads can be run in plain linear layers without"):
        model(*batch(), architecture=THREE_OF_FIVE)


def test_layers_of_fewer_heads_are_recorded_and_their_scores_not_compared():
    model, inputs = supernet(), batch()
    choice = CHOICES["no attention"]
    states = model.states(*inputs, architecture=choice)
    assert [h.shape for h in states.hidden] == [(3, 8, 35)] * 3
    assert [q.shape for q in states.queries] == [(3, HEADS, 8, SIZE)]
    heads = [(torch.zeros(3, HEADS, 8, SIZE),) * 2] * 3
    with pytest.raises(UserError, match=r"attention: layer 0 runs 0 of 5 heads.*set the attention weight to 0"):
        model.states(*inputs, architecture=choice, score_targets=heads)
    with pytest.raises(UserError, match="attention: layer 0 runs 3 of 5 heads"):
        model.states(*inputs, architecture=THREE_OF_FIVE, score_targets=heads)


def test_a_pruned_student_is_built_from_nothing():
    shape = config().shape
    model = build_student(shape, CHOICES["one block of each"], HEADS, seed=3).eval()
    assert [layer.attention is None for layer in model.ffnas.encoder] == [False, True, True]
    assert torch.isfinite(model(*batch()).logits).all()
    assert model.config.shape == shape
    assert model.config.full_architecture.layers[1].expression == GELU_FFN
