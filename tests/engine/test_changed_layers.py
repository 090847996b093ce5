"""Found models with adapters, parametrizations, pruning, quantization, offloading or hooks on their layers, against the
plain PyTorch files of the same model (`engine.handover`) with the same attached."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from encoder_reference import randomize, small_config
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from engine.errors import UserError
from engine.export.export import export_model
from engine.export.saved import load_saved
from engine.handover import load_plain
from engine.objective import KDWeights, kd_loss
from engine.student import FFNASForSequenceClassification
from kernels import readable

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
from attached import ATTACHMENTS, LoraLinear, lora, merge, pruning, switch

# float32 rounding through four small layers, in another order of summation
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def linears(_, module) -> bool:
    return type(module) is nn.Linear


def in_ffn(name, module) -> bool:
    return type(module) is nn.Linear and "all_ffn" in name


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = FFNASForSequenceClassification(small_config(num_labels=3))
    randomize(model)
    path = tmp_path_factory.mktemp("found") / "model"
    export_model(model, None, path, None, {})
    return path


def pair(folder):
    return load_saved(folder), load_plain(folder)


def inputs(batch=8, length=11):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 53, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.randint(2, length + 1, (batch, 1), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def with_gradients(model, given):
    out = model(**given).logits
    named = {n: p for n, p in model.named_parameters() if p.requires_grad and "fit_dense" not in n}
    grads = torch.autograd.grad((out * torch.tensor([1.0, -2.0, 0.5])).sum(), list(named.values()), allow_unused=True)
    return out, dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("select", [linears, in_ffn], ids=["all", "ffn"])
@pytest.mark.parametrize("name", ATTACHMENTS)
def test_found_models_run_what_is_attached(folder, name, select):
    ours, plain = pair(folder)
    given = inputs()
    for model in (ours, plain):
        ATTACHMENTS[name](model, select)
    out, own = with_gradients(ours, given)
    expected, theirs = with_gradients(plain, given)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert own.keys() == theirs.keys()
    for key, gradient in own.items():
        if theirs[key] is None:
            assert gradient is None or not gradient.any(), key
        else:
            torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
    with torch.no_grad():  # the ways without gradients: fused projections, first token alone
        torch.testing.assert_close(ours(**given).logits, expected, **CLOSE)
        longer = inputs(16, 13)
        torch.testing.assert_close(ours(**longer).logits, plain(**longer).logits, **CLOSE)


def test_every_adapter_gets_gradients_and_merging_keeps_the_output(folder):
    ours, _ = pair(folder)
    ours.requires_grad_(False)
    given = inputs()
    without = ours(**given).logits
    lora(ours, linears)
    adapters = {n: p for n, p in ours.named_parameters() if "lora_" in n and "fit_dense" not in n}
    logits = ours(**given).logits
    assert (logits - without).abs().max() > 0.05
    grads = torch.autograd.grad(logits.square().sum(), list(adapters.values()))
    assert [n for n, g in zip(adapters, grads, strict=True) if not g.any()] == []
    switch(ours, False)
    torch.testing.assert_close(ours(**given).logits, without, **CLOSE)
    switch(ours, True)
    merge(ours)
    torch.testing.assert_close(ours(**given).logits, logits, **CLOSE)
    assert not any(isinstance(m, LoraLinear) for m in ours.modules())


def test_adapters_on_ffns_alone_train(folder):
    ours, _ = pair(folder)
    ours.requires_grad_(False)
    lora(ours, in_ffn)
    wanted = [p for n, p in ours.named_parameters() if "lora_" in n]
    for p in wanted:
        p.requires_grad_(True)
    ours.train()
    optimizer = torch.optim.SGD(wanted, lr=0.05)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ours(**inputs(), labels=torch.arange(8) % 3).loss
        loss.backward()
        assert all(p.grad is not None for p in wanted)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["embeddings.segment_embeddings", "embeddings.position_embeddings"])
def test_embeddings_are_called_where_something_is_attached(folder, where):
    ours, plain = pair(folder)
    before = ours(**inputs()).logits
    for model in (ours, plain):
        model.base_model.get_submodule(where).register_forward_hook(lambda _, __, out: out * 3.0)
    torch.testing.assert_close(ours(**inputs()).logits, plain(**inputs()).logits, **CLOSE)
    assert not torch.allclose(ours(**inputs()).logits, before, **CLOSE)


@pytest.mark.parametrize("where", ["attention.layernorm", "attention.dropout", "attention.query", "all_ffn.0"])
@torch.no_grad()
def test_hooks_on_parts_that_are_fused_without_gradients_fire(folder, where):
    ours, _ = pair(folder)
    fired = []
    ours.base_model.encoder[0].get_submodule(where).register_forward_pre_hook(lambda _, args: fired.append(args))
    ours(**inputs(16, 12))
    assert len(fired) == 1


@torch.no_grad()
def test_hooks_of_all_modules_fire(folder):
    ours, plain = pair(folder)
    seen = {"FFNAS": [], "plain": []}
    for name, model in (("FFNAS", ours), ("plain", plain)):
        own = list(seen.values())[name == "plain"]
        handle = register_module_forward_hook(lambda m, *_, own=own: own.append(type(m).__name__))
        try:
            model(**inputs(16, 12))
        finally:
            handle.remove()
    count = {name: [k for k in kinds if k in ("Linear", "LayerNorm")] for name, kinds in seen.items()}
    assert count["FFNAS"] == count["plain"] != []


def test_subnets_of_changed_layers_are_refused_in_one_line(folder):
    model = FFNASForSequenceClassification(small_config(num_labels=3))
    full = model.config.full_architecture
    narrow = type(full)(tuple(replace(layer, ratio=layer.ratio * Fraction(1, 2)) for layer in full.layers))
    model(**inputs(), architecture=narrow)
    pruning(model, in_ffn)
    model(**inputs())
    with pytest.raises(UserError, match="a subnet of narrower FFNs takes plain linear layers") as error:
        model(**inputs(), architecture=narrow)
    assert "\n" not in str(error.value)


def test_the_projection_of_distillation_is_called_where_something_is_attached():
    torch.manual_seed(0)
    model = FFNASForSequenceClassification(small_config(num_labels=3, teacher_hidden_size=20))
    given = inputs()
    teacher = FFNASForSequenceClassification(small_config(num_labels=3, hidden_size=20, num_attention_heads=4))
    mask = given["attention_mask"].bool()
    wanted = teacher.states(**given)
    options = {"fit_dense": model.fit_dense, "weights": KDWeights(), "terms": ("hidden",)}
    before = kd_loss(model.states(**given), wanted, mask, **options).total
    model.fit_dense.register_forward_hook(lambda _, __, out: out * 2.0)
    hooked = kd_loss(model.states(**given), wanted, mask, **options).total
    states = model.states(**given)
    expected = sum(
        ((model.fit_dense(own) - other)[mask].square()).mean()
        for own, other in zip((states.embeddings, *states.hidden), (wanted.embeddings, *wanted.hidden), strict=True)
    )
    torch.testing.assert_close(hooked, expected, **CLOSE)
    assert not torch.allclose(hooked, before)


def test_plain_models_are_read(folder, monkeypatch):
    monkeypatch.setattr(readable, "note", lambda *_, **__: pytest.fail("a layer of a plain model was called"))
    ours, plain = pair(folder)
    torch.testing.assert_close(ours(**inputs()).logits, plain(**inputs()).logits, **CLOSE)
