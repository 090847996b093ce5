"""The last layer for the first token alone: the numbers of the whole layer, and the whole layer where rows are read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from encoder_reference import TRUNCATE, architecture, randomize, small_config
from torch import nn

from engine.autocast import autocast
from engine.student import FFNASForMultipleChoice, FFNASForSequenceClassification
from engine.student import first_token as module
from engine.student.first_token import attend_first


@pytest.fixture(autouse=True)
def _layers(monkeypatch):
    """What is tested here are the layers, whose place the runtime would take."""
    monkeypatch.setenv("FFNAS_RUNTIME", "0")


def classifier(kind=FFNASForSequenceClassification, **changes):
    stored = architecture([(TRUNCATE[0], 2, 1)] * changes.get("num_hidden_layers", 3))
    return randomize(kind(small_config(layers=stored, num_labels=3, **changes)), 0).eval()


def inputs(batch=5, length=11, vocab=53, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (batch, length), generator=generator)
    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths).long()}


@pytest.fixture
def calls(monkeypatch):
    """Sizes of what `attend_first` was asked for."""
    seen, real = [], module.attend_first
    monkeypatch.setattr(
        "engine.student.encoder.attend_first", lambda a, x, *rest: seen.append(x.shape) or real(a, x, *rest)
    )
    return seen


@torch.no_grad()
def whole(model, given):
    return model(**given, output_hidden_states=True).logits


@pytest.mark.parametrize(
    "changes",
    [{}, {"width_policy": "pad"}, {"embedding_type": "full"}, {"num_hidden_layers": 1}, {"hidden_size": 60}],
    ids=lambda c: ",".join(c) or "plain",
)
@pytest.mark.parametrize("masked", [True, False], ids=["padding", "no mask"])
def test_logits_are_those_of_the_whole_layer(changes, masked, calls):
    model, given = classifier(**changes).double(), inputs()
    if not masked:
        del given["attention_mask"]
    with torch.no_grad():
        logits = model(**given).logits
    assert len(calls) == 1
    # float64: what is left is rounding, amplified by two LayerNorms of some ten values
    torch.testing.assert_close(logits, whole(model, given), rtol=1e-11, atol=1e-11)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 96])
def test_rounding_errors_are_no_larger_than_the_whole_layers(dtype, length):
    model, given = classifier(hidden_size=48, max_position_embeddings=96), inputs(32, length)
    exact = whole(model.double(), given)
    rounded = model.to(dtype)
    with torch.no_grad():
        short = rounded(**given).logits
    error, theirs = ((x.double() - exact).square().mean().sqrt() for x in (short, whole(rounded, given)))
    assert error <= 1.5 * theirs + 1e-7  # means over 96 values vary by a tenth or two
    assert theirs > 0


def test_autocast(calls):
    model, given = classifier(hidden_size=48), inputs(16)
    exact = whole(model, given)
    with torch.no_grad(), autocast(torch.device("cpu"), "bf16"):
        short = model(**given).logits.float()
        theirs = model(**given, output_hidden_states=True).logits.float()
    assert len(calls) == 1
    assert (short - exact).abs().mean() <= 2 * (theirs - exact).abs().mean() + 1e-3


def test_a_sequence_without_real_tokens_attends_to_nothing():
    attention, x = classifier().double().base_model.encoder[0].attention, torch.randn(3, 6, 15, dtype=torch.float64)
    mask = torch.ones(3, 1, 1, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, ..., 4:] = False
    with torch.no_grad():
        torch.testing.assert_close(attend_first(attention, x, mask), attention(x, mask)[0][:, 0])


def test_multiple_choice(calls):
    model, given = classifier(FFNASForMultipleChoice).double(), inputs(6)
    given = {name: value.view(2, 3, -1) for name, value in given.items()}
    with torch.no_grad():
        logits = model(**given).logits
    assert len(calls) == 1
    torch.testing.assert_close(logits, whole(model, given), rtol=1e-11, atol=1e-11)


def test_loss_is_computed_too(calls):
    model, given = classifier(), inputs()
    with torch.no_grad():
        out = model(**given, labels=torch.tensor([0, 1, 2, 0, 1]))
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, torch.tensor([0, 1, 2, 0, 1])))
    assert out.hidden_states is None
    assert len(calls) == 1


def _adapted(model):
    class Adapter(nn.Linear):
        pass

    attention = model.base_model.encoder[-1].attention
    attention.key.__class__ = Adapter


WHOLE = {
    "training": lambda m: m.train(),
    "eager attention": lambda m: m.set_attn_implementation("eager"),
    "hook on keys": lambda m: m.base_model.encoder[-1].attention.key.register_forward_hook(lambda *_: None),
    "hook on the layer": lambda m: m.base_model.encoder[-1].register_forward_pre_hook(lambda *_: None),
    "offloaded weights": lambda m: setattr(m.base_model.encoder[-1].attention.value, "_hf_hook", object()),
    "another linear layer": _adapted,
}


@pytest.mark.parametrize("what", WHOLE)
def test_the_whole_layer_runs_where_it_may_be_watched_or_changed(what, calls):
    model = classifier()
    WHOLE[what](model)
    with torch.no_grad():
        model(**inputs())
    assert calls == []


@pytest.mark.parametrize(
    "asked",
    [{"output_hidden_states": True}, {"states_layers": "all"}, {"states_layers": (2,)}],
    ids=lambda a: next(iter(a)),
)
def test_the_whole_layer_runs_where_its_rows_are_asked_for(asked, calls):
    model, given = classifier(), inputs()
    with torch.no_grad():
        model(**given, **asked)
    assert calls == []


def test_the_whole_layer_runs_with_gradients_and_for_the_encoder_alone(calls):
    model, given = classifier(), inputs()
    model(**given).logits.sum().backward()
    with torch.no_grad():
        assert model.base_model(**given).last_hidden_state.shape == (5, 11, 15)
    assert calls == []


def test_a_mask_over_queries_gets_the_whole_layer(calls):
    model, given = classifier(), inputs(4, 6)
    over_queries = torch.ones(4, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        first = model(input_ids=given["input_ids"], attention_mask=over_queries).logits
    assert calls == []
    assert np.isfinite(first.numpy()).all()


def test_exported_programs_hold_the_whole_layer(calls):
    model, given = classifier(), inputs()
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        exported = program.module()(**given)
        assert calls == []
        torch.testing.assert_close(exported["logits"], model(**given).logits, rtol=1e-4, atol=1e-5)
