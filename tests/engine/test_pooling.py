"""Poolings and pooler activations: against formulas written out, in every place that computes a head."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from encoder_reference import architecture, batch, gelu, linear, parameters, randomize, small_config

from engine.data import Batch
from engine.distill.mixed import mixed_states
from engine.errors import UserError
from engine.export.export import export_model
from engine.handover import load_plain
from engine.student import FFNASForMultipleChoice, FFNASForSequenceClassification, FFNASModel
from engine.student.supernet import extract, inherit

SUBNET = architecture([("linear(gelu(linear(x,wb1)),wb2)", 1, k) for k in (1, 2, 3)])
ACTIVATIONS = {
    "tanh": torch.tanh,
    "relu": lambda a: a.clamp(min=0),
    "gelu": gelu,
    "gelu_erf": lambda a: 0.5 * a * (1 + torch.erf(a / math.sqrt(2))),
}


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    """What is tested here are the layers, whose place the runtime would take."""
    monkeypatch.setenv("FFNAS_RUNTIME", "0")


def make(cls=FFNASForSequenceClassification, **changes):
    return randomize(cls(small_config(num_labels=3, **changes)).double()).eval()


def mean_of(hidden, mask):
    return torch.stack([row[real].mean(0) for row, real in zip(hidden, mask, strict=True)])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_activation_behind_the_first_token(name):
    model, inputs = make(pooler_activation=name), batch()
    with torch.no_grad():
        first = model.ffnas(*inputs).last_hidden_state[:, 0]
        p = parameters(model)
        expected = linear(ACTIVATIONS[name](linear(first, p, "cls_pooler.dense")), p, "classifier")
        torch.testing.assert_close(model(*inputs).logits, expected, rtol=1e-9, atol=1e-10)


def test_mean_pooling_leaves_padding_out_and_has_no_dense_layer():
    model, inputs = make(pooling="mean", embedding_type="full"), batch()
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]
    with torch.no_grad():
        hidden = model.ffnas(*inputs).last_hidden_state
        expected = linear(mean_of(hidden, inputs[1]), parameters(model), "classifier")
        torch.testing.assert_close(model(*inputs).logits, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(model.classify(hidden, inputs[1]), expected, rtol=1e-9, atol=1e-10)
        alone = model(inputs[0][1:2, : inputs[1][1].sum()], token_type_ids=inputs[2][1:2, : inputs[1][1].sum()])
        torch.testing.assert_close(alone.logits, expected[1:2], rtol=1e-9, atol=1e-10)
        empty = model(inputs[0], torch.zeros_like(inputs[1])).logits
    assert empty.isfinite().all()
    with pytest.raises(UserError, match="attention_mask: mean pooling needs one of shape"):
        model(inputs[0], torch.ones(3, 1, 8, 8, dtype=torch.bool))


def test_mean_pooling_of_choices():
    model, rows = make(FFNASForMultipleChoice, pooling="mean"), batch(rows=6)
    with torch.no_grad():
        pooled = mean_of(model.ffnas(*rows).last_hidden_state, rows[1])
        expected = linear(pooled, parameters(model), "classifier").reshape(2, 3)
        torch.testing.assert_close(model(*(v.reshape(2, 3, 8) for v in rows)).logits, expected)


@pytest.mark.parametrize(
    "changes", [{"pooling": "mean"}, {"pooler_activation": "gelu_erf"}, {"pooler_activation": "relu"}], ids=str
)
def test_subnets_copies_and_plain_files_pool_alike(changes, tmp_path):
    model = randomize(FFNASForSequenceClassification(small_config(num_labels=3, **changes))).eval()
    ids, mask, types = batch()
    with torch.no_grad():
        expected = model(ids, mask, types, architecture=SUBNET)
        small = extract(model, SUBNET)
        assert torch.equal(small(ids, mask, types).logits, expected.logits)
        other = FFNASForSequenceClassification(small.config)
        assert inherit(other, model) == []
        assert torch.equal(other.eval()(ids, mask, types).logits, expected.logits)
        mixed = mixed_states(model, Batch(ids, mask, types), [SUBNET, SUBNET])
        torch.testing.assert_close(mixed[1].logits, expected.logits, rtol=1e-5, atol=1e-5)
        export_model(model, None, tmp_path / "model", SUBNET, {})
        plain = load_plain(tmp_path / "model")(ids, attention_mask=mask, token_type_ids=types)
        torch.testing.assert_close(plain.logits, expected.logits, rtol=1e-5, atol=1e-5)
        reloaded = FFNASForSequenceClassification.from_pretrained(tmp_path / "model").eval()
        np.testing.assert_array_equal(reloaded(ids, mask, types).logits, small(ids, mask, types).logits)


def test_an_encoder_alone_pools_too():
    model, inputs = make(FFNASModel, pooling="mean"), batch()
    with torch.no_grad():
        out = model(*inputs)
        torch.testing.assert_close(out.pooler_output, mean_of(out.last_hidden_state, inputs[1]))


@pytest.mark.parametrize("field", ["pooling", "pooler_activation"])
def test_unknown_values_are_named(field):
    with pytest.raises(UserError, match=f"{field}: unknown value 'max'"):
        small_config(**{field: "max"})
