"""Students with Kronecker weights: counted, inherited from full weights, shared by subnets, exported, trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_reference import architecture, batch, randomize, small_config, small_shape
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from engine.architecture.flops import layer_flops
from engine.architecture.params import count_parameters, layer_parameters
from engine.architecture.shape import ModelShape, ruled_block
from engine.data import Batch
from engine.distill.mixed import mixed_states
from engine.errors import UserError
from engine.export.export import export_model
from engine.handover.directory import load_plain
from engine.student import FFNASForSequenceClassification
from engine.student.ffn import ffn_weights
from engine.student.supernet import build_student, extract, inherit
from kernels.ffn.kron import KronWeight, kron_linear, nearest_kron

SIZES = {"hidden_size": 24, "ffn_size": 24}
CONFIG = {"hidden_size": 24, "intermediate_size": 24}
PLAIN = "linear(gelu(linear(x,wb1)),wb2)"
BOTH = "kron(gelu(kron(x,wb1)),wb2)"
ONE = "linear(relu2(mul(kron(x,wb1),x)),wb2)"
FOUND = architecture([(BOTH, 1, 2), (PLAIN, 2, 3), (ONE, 2, 4)])
STORED = architecture([(BOTH, 2, 1), (PLAIN, 2, 1), (ONE, 2, 1)])


def supernet(layers, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    model = FFNASForSequenceClassification(small_config(**CONFIG, layers=layers))
    return randomize(model, seed).to(dtype).eval()


def dense_supernet(seed=0):
    return supernet(architecture([(PLAIN, 2, 1)] * 3), seed)


def ffns(model, layer):
    return list(model.ffnas.encoder[layer].all_ffn)


def test_parameters_are_counted_exactly():
    shape = small_shape(**SIZES)
    model = build_student(shape, FOUND, heads=3)
    own = sum(
        p.numel() for name, p in model.named_parameters() if ".cls_pooler." not in name and "classifier" not in name
    )
    assert own == count_parameters(FOUND, shape)
    assert shape.block == ruled_block(24, 24) == (2, 4)
    for index, layer in enumerate(FOUND.layers):
        stored = sum(p.numel() for p in model.ffnas.encoder[index].all_ffn.parameters())
        assert stored == layer_parameters(layer, shape)


@pytest.mark.parametrize("block", [None, (12, 4), (3, 2)])
def test_flops_are_those_of_the_two_products(block):
    """Against torch's counter on the factored products of one FFN."""
    shape = small_shape(**SIZES, kron_block=block)
    layer = architecture([(BOTH, 3, 2)]).layers[0]
    model = build_student(small_shape(**SIZES, kron_block=block), architecture([(BOTH, 3, 2)] * 3), heads=3)
    dense1, dense2 = ffns(model, 0)[0].dense1, ffns(model, 0)[0].dense2
    with FlopCounterMode(display=False) as counter:
        h = kron_linear(torch.randn(8, 24), dense1.weight, dense1.bias)
        kron_linear(h, dense2.weight, dense2.bias)
    assert layer_flops(layer, shape, length=8) == 3 * counter.get_total_flops()


def test_an_extracted_candidate_has_the_nearest_products_of_the_supernet():
    model = dense_supernet()
    found = extract(model, FOUND)
    source, own = ffns(model, 0)[0], ffns(found, 0)[0]
    for weight, dense in ((source.dense1.weight[:12], own.dense1), (source.dense2.weight[:, :12], own.dense2)):
        expected = nearest_kron(weight.detach(), tuple(dense.b.shape))
        assert torch.equal(dense.a, expected.a)
        assert torch.equal(dense.b, expected.b)
    assert torch.equal(own.dense1.bias, source.dense1.bias[:12])
    assert torch.equal(ffns(found, 1)[0].dense1.weight, ffns(model, 1)[0].dense1.weight[:8])
    with pytest.raises(UserError, match="Kronecker weights are wb1 and wb2, those this model stores none"):
        model(*batch(), architecture=FOUND)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_subnets_are_views_of_the_factors(k):
    model = supernet(STORED)
    found = architecture([(BOTH, 1, k), (PLAIN, 2, k), (ONE, 1, k)])
    inputs = batch()
    expected = model(*inputs, architecture=found).logits
    assert torch.equal(extract(model, found)(*inputs).logits, expected)
    full = ffns(model, 0)[0]
    w1, b1, w2, _ = ffn_weights([full], 24 // k)
    assert isinstance(w1[0], KronWeight)
    assert w1[0].a.data_ptr() == full.dense1.a.data_ptr()
    torch.testing.assert_close(w1[0].whole(), full.dense1.weight.whole()[: 24 // k])
    torch.testing.assert_close(w2[0].whole(), full.dense2.weight.whole()[:, : 24 // k])
    assert len(b1[0]) == 24 // k


def test_products_become_full_weights_and_back():
    model = supernet(STORED)
    plain = architecture([(PLAIN, 2, 1)] * 3)
    full = extract(model, plain)
    torch.testing.assert_close(ffns(full, 0)[1].dense2.weight, ffns(model, 0)[1].dense2.weight.whole())
    again = supernet(STORED, seed=5)
    inherit(again, full)
    for a, b in zip(ffns(again, 0), ffns(model, 0), strict=True):
        torch.testing.assert_close(a.dense1.weight.whole(), b.dense1.weight.whole())
    other = FFNASForSequenceClassification(small_config(**CONFIG, layers=STORED, kron_block=[6, 8])).double()
    inherit(other, model)  # another block: nearest product of the product
    expected = nearest_kron(ffns(model, 0)[0].dense1.weight.whole(), (6, 8))
    torch.testing.assert_close(ffns(other, 0)[0].dense1.weight.whole(), expected.whole())


def test_mixed_forward_and_gradients_of_the_factors():
    model = supernet(STORED)
    ids, mask, types = batch()
    subnets = [architecture([(BOTH, n, k), (PLAIN, 2, k), (ONE, n, 1)]) for n, k in ((1, 2), (2, 3))]
    states = mixed_states(model, Batch(ids, mask, types), subnets)
    sum(s.logits.sum() for s in states).backward()
    together = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(n.endswith("dense1.a") for n in together)
    model.zero_grad()
    for subnet, state in zip(subnets, states, strict=True):
        out = model(ids, mask, types, architecture=subnet).logits
        torch.testing.assert_close(state.logits, out)
        out.sum().backward()
    for name, parameter in model.named_parameters():
        if name in together:
            torch.testing.assert_close(together[name], parameter.grad)


def test_saved_and_exported_models_compute_the_same(tmp_path):
    model = supernet(STORED, dtype=torch.float32)
    inputs = batch()
    expected = model(*inputs, architecture=FOUND).logits
    extract(model, FOUND).save_pretrained(tmp_path / "own")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "own").eval()
    assert loaded.config.kron_block == [2, 4]
    assert torch.equal(loaded(*inputs).logits, expected)
    export_model(model, None, tmp_path / "plain", FOUND, {"name": "kron"})
    torch.testing.assert_close(load_plain(tmp_path / "plain")(*inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_factors_learn():
    torch.manual_seed(0)
    model = build_student(small_shape(**SIZES), FOUND, heads=3, hidden_dropout_prob=0.1)
    inputs, labels = batch(), torch.tensor([0, 1, 0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(model(*inputs).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(("block", "words"), [
    ([5, 4], "5 does not divide the inner width 12"), ([2, 7], "7 does not divide the hidden width 24"),
    ([2], "must be two positive integers"), ("2x4", "must be two positive integers"),
    ([2, -4], "two positive integers"),
])  # fmt: skip
def test_wrong_blocks_are_named(block, words):
    with pytest.raises(UserError, match=words):
        small_config(**CONFIG, layers=FOUND, kron_block=block)


def test_the_paper_sizes():
    """EfficientBERT's sizes with both weights of all layers factored: 900 times fewer FFN weights."""
    shape = ModelShape(540, 6, 540, teacher_hidden_size=768)
    full, small = (architecture([(text, 4, 1)] * 6) for text in (PLAIN, BOTH))
    assert shape.block == (15, 20)
    assert count_parameters(full, shape) - count_parameters(small, shape) == 6 * 4 * 2 * (540 * 540 - 36 * 27 - 15 * 20)
