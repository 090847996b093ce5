"""Sorting neurons and heads leaves a model as it was; least-squares fits are those of numpy on all rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from engine.data import Batch
from engine.student.calibration import RIDGE, calibrate, fit_inner, refit, reorder
from engine.student.from_encoder import standard_model
from kernels.language.expression import parse_expression

HIDDEN, HEADS, INNER, LAYERS = 20, 4, 37, 2


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INNER,
        max_position_embeddings=16, initializer_range=0.3,
    )  # fmt: skip
    return standard_model(BertForSequenceClassification(config).eval()).eval()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(1, 50, (5, 11), generator=generator)
        mask = torch.arange(11) < torch.randint(2, 12, (5, 1), generator=generator)
        yield Batch(ids * mask, mask, torch.zeros_like(ids))


def answers(model):
    with torch.no_grad():
        return [model(b.input_ids, attention_mask=b.attention_mask).logits for b in batches()]


def test_statistics_are_those_of_all_real_tokens(model):
    found = calibrate(model, batches())
    tokens = sum(int(b.mask.sum()) for b in batches())
    for layer in found:
        assert layer.inner.shape == (INNER + 1, INNER + 1)
        assert layer.inner[-1, -1] == pytest.approx(1.0)  # of the ones: every real token counted once
        assert layer.inputs.shape == (tokens, HIDDEN)
    first = model.base_model.encoder[0].all_ffn[0]
    values = F.gelu(F.linear(found[0].inputs, first.dense1.weight, first.dense1.bias)).double()
    torch.testing.assert_close(found[0].inner[:-1, :-1], values.T @ values / tokens, rtol=1e-4, atol=1e-5)


def test_a_sorted_model_answers_as_before_and_leads_with_what_matters(model):
    before = answers(model)
    statistics = reorder(model, calibrate(model, batches()))
    for a, b in zip(answers(model), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    again = calibrate(model, batches())
    for layer, found, fresh in zip(model.base_model.encoder, statistics, again, strict=True):
        torch.testing.assert_close(found.inner, fresh.inner, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.context, fresh.context, rtol=1e-4, atol=1e-5)
        strength = fresh.inner.diagonal()[:-1].sqrt() * layer.all_ffn[0].dense2.weight.double().norm(dim=0)
        assert torch.all(strength[:-1] >= strength[1:] * (1 - 1e-5))


@pytest.mark.parametrize("width", [1, 7, INNER - 1, INNER])
def test_refit_solves_the_ridge_problem(model, width):
    """Against numpy's least squares on the rows themselves, the ridge as further rows."""
    statistics = calibrate(model, batches())[1]
    ffn = model.base_model.encoder[1].all_ffn[0]
    values = F.gelu(F.linear(statistics.inputs, ffn.dense1.weight, ffn.dense1.bias)).detach().double().numpy()
    weight, bias = ffn.dense2.weight.detach().double().numpy(), ffn.dense2.bias.detach().double().numpy()
    target = values @ weight.T + bias
    tokens = len(values)
    pull = np.sqrt(tokens * RIDGE * (values**2).mean())
    rows = np.concatenate([np.hstack([values[:, :width], np.ones((tokens, 1))]), pull * np.eye(width, width + 1)])
    wanted = np.concatenate([target, pull * weight[:, :width].T])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    fitted, offset = refit(statistics.inner, ffn.dense2.weight, ffn.dense2.bias, width)
    np.testing.assert_allclose(fitted.detach().numpy(), expected[:-1].T, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(offset.detach().numpy(), expected[-1], rtol=2e-3, atol=2e-4)


def test_refit_of_everything_is_the_whole_product(model):
    found = calibrate(model, batches())[0]
    dense = model.base_model.encoder[0].attention.dense
    weight, bias = refit(found.context, dense.weight, dense.bias, HIDDEN)
    torch.testing.assert_close(weight, dense.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bias, dense.bias, rtol=1e-4, atol=1e-5)


def test_another_expression_is_fitted_to_the_same_output(model):
    """Better than the teacher's own second product, and not far from it where the activation is close."""
    found = calibrate(model, batches(12))[0]
    source = model.base_model.encoder[0].all_ffn[0]
    own = copy.deepcopy(source)
    original, other = (parse_expression(f"linear({name}(linear(x,wb1)),wb2)") for name in ("gelu_erf", "relu"))
    with torch.no_grad():
        inner = F.relu(F.linear(found.inputs, own.dense1.weight, own.dense1.bias))
        wanted = F.linear(
            F.gelu(F.linear(found.inputs, own.dense1.weight, own.dense1.bias)), own.dense2.weight, own.dense2.bias
        )
        weight, bias = fit_inner(own, other, source, original, found.inputs)
        fitted = (F.linear(inner, weight, bias) - wanted).square().mean()
        plain = (F.linear(inner, own.dense2.weight, own.dense2.bias) - wanted).square().mean()
    assert fitted < 0.6 * plain
