"""The student encoder against a float64 reference of its whole arithmetic; subnets, sizes, bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from encoder_reference import (
    PAD,
    RELEASED,
    TRUNCATE,
    architecture,
    batch,
    encode,
    parameters,
    random_architecture,
    randomize,
    small_config,
)

from engine.architecture.architecture import Architecture
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape, inner_width
from engine.errors import UserError
from engine.student import FFNASConfig, FFNASForSequenceClassification, FFNASModel
from engine.student.supernet import build_student

EXACT = {"rtol": 1e-9, "atol": 1e-10}
"""float64 against float64 with sums in another order: about 1e-13 expected; some room for 3 stacked layers."""


def make(seed=0, **changes):
    return randomize(FFNASModel(small_config(**changes)).double(), seed).eval()


def plan_of(arch, config):
    return [(str(v.expression), v.stack, inner_width(v.ratio, config.intermediate_size)) for v in arch.layers]


CASES = {
    "trigram-truncate": ({}, [(TRUNCATE[1], 2, 1), (TRUNCATE[4], 1, 2), (TRUNCATE[3], 3, 3)]),
    "full-truncate": ({"embedding_type": "full"}, [(TRUNCATE[0], 1, 4), (TRUNCATE[2], 2, 2), (TRUNCATE[4], 1, 3)]),
    "factorized-truncate": (
        {"embedding_type": "factorized"},
        [(TRUNCATE[0], 1, 4), (TRUNCATE[3], 2, 2), (TRUNCATE[4], 1, 3)],
    ),
    "trigram-pad-wide": (
        {"width_policy": "pad", "intermediate_size": 19},
        [(PAD[0], 2, 1), (PAD[1], 1, 2), (PAD[2], 1, 3)],
    ),
    "one-head": ({"num_attention_heads": 1, "pad_token_id": None}, [(TRUNCATE[0], 1, 1)] * 3),
    "eager": ({"attn_implementation": "eager"}, [(TRUNCATE[1], 1, 2)] * 3),
}


@pytest.mark.parametrize("name", CASES)
def test_encoder_equals_reference_in_values_and_gradients(name):
    changes, layers = CASES[name]
    arch = architecture(layers)
    model = make(layers=arch, **changes)
    ids, mask, types = batch(seed=1)
    states = model.states(ids, mask, types)
    embedded, hidden, scores = encode(parameters(model), model.config, plan_of(arch, model.config), ids, mask, types)
    torch.testing.assert_close(states.embeddings, embedded, **EXACT)
    for ours, theirs in zip(states.hidden, hidden, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for q, k, score in zip(states.queries, states.keys, scores, strict=True):
        torch.testing.assert_close(q @ k.transpose(-1, -2), score, **EXACT)
    weight = torch.randn(hidden[-1].shape, dtype=torch.float64)
    real = mask[..., None]  # nothing is promised about the outputs at padding
    used = {n: p for n, p in model.named_parameters() if not n.startswith(("cls_pooler", "fit_dense"))}
    ours = torch.autograd.grad((states.hidden[-1] * weight * real).sum(), list(used.values()))
    theirs = torch.autograd.grad((hidden[-1] * weight * real).sum(), list(used.values()))
    for parameter, a, b in zip(used, ours, theirs, strict=True):
        if parameter == "embeddings.token_embeddings.weight" and model.config.pad_token_id is not None:
            b[model.config.pad_token_id] = 0  # the padding token is not trained
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda text, name=parameter: f"{name}: {text}")


@pytest.mark.parametrize("embedding_type", ["full", "factorized", "trigram"])
def test_padding_changes_no_real_token(embedding_type):
    model = make(embedding_type=embedding_type)
    model.get_input_embeddings().weight.data[0] = 0  # where it starts, and stays: the next test
    ids, mask, types = batch(seed=2, rows=2)
    length = int(mask[1].sum())
    whole = model(ids[1:], mask[1:], types[1:]).last_hidden_state[:, :length]
    alone = model(ids[1:, :length], None, types[1:, :length]).last_hidden_state
    torch.testing.assert_close(whole, alone, **EXACT)


def test_the_padding_tokens_embedding_starts_at_zero_and_is_not_trained():
    model = FFNASModel(small_config())
    model(*batch()).last_hidden_state.square().sum().backward()
    assert (model.get_input_embeddings().weight[0] == 0).all()
    assert (model.get_input_embeddings().weight.grad[0] == 0).all()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_fully_padded_row_stays_finite(implementation):
    model = make(attn_implementation=implementation)
    ids, mask, types = batch(seed=3)
    mask[1] = False
    states = model.states(ids, mask, types)
    assert all(torch.isfinite(h).all() for h in states.hidden)
    states.hidden[-1][mask].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_subnets_of_a_supernet_equal_the_reference():
    rng = np.random.default_rng(0)
    model = make(layers=architecture([(TRUNCATE[0], 3, 1)] * 3))
    ids, mask, types = batch(seed=4)
    for _ in range(8):
        arch = random_architecture(rng)
        got = model(ids, mask, types, architecture=arch).last_hidden_state
        _, hidden, _ = encode(parameters(model), model.config, plan_of(arch, model.config), ids, mask, types)
        torch.testing.assert_close(got, hidden[-1], **EXACT)


def test_a_subnet_trains_only_its_slice_of_the_stored_weights():
    model = make(layers=architecture([(TRUNCATE[0], 3, 1)] * 3))
    ids, mask, types = batch()
    arch = architecture([(TRUNCATE[1], 2, 2)] * 3)
    model(ids, mask, types, architecture=arch).last_hidden_state.square().sum().backward()
    ffn = model.encoder[1].all_ffn
    inner = 13 // 2
    assert ffn[0].dense1.weight.grad[:inner].abs().min() > 0
    assert ffn[0].dense1.weight.grad[inner:].abs().max() == 0
    assert ffn[1].dense2.weight.grad[:, inner:].abs().max() == 0
    assert ffn[2].dense1.weight.grad is None


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        (architecture([(TRUNCATE[0], 1, 1)] * 2), ("2 layers", "the model 3")),
        (architecture([(TRUNCATE[0], 3, 1)] * 3), ("layers[0]", "stack 3", "2")),
        (architecture([(TRUNCATE[0], 2, 2), (TRUNCATE[0], 1, 1), (TRUNCATE[0], 1, 2)]), ("layers[1]", "width 13", "6")),
        (architecture([(TRUNCATE[0], 1, 2)] * 2 + [(PAD[0], 1, 3)]), ("layers[2]", "wide")),
    ],
    ids=["layer-count", "stack", "width", "expression-width"],
)
def test_an_architecture_the_model_does_not_store_is_refused(arch, words):
    stored = architecture([(TRUNCATE[0], 2, 1), (TRUNCATE[0], 2, 2), (TRUNCATE[0], 2, 2)])
    model = make(layers=stored, width_policy="pad")
    with pytest.raises(UserError) as error:
        model(*batch(), architecture=arch)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 4}, ("num_attention_heads: 4", "hidden_size 15", "use 3 heads")),
        ({"hidden_size": 0}, ("hidden_size", "positive")),
        ({"embedding_type": "bigram"}, ("embedding_type", "bigram", "trigram")),
        ({"width_policy": "crop"}, ("width_policy", "crop", "truncate")),
        ({"hidden_dropout_prob": 1.0}, ("hidden_dropout_prob", "1.0")),
        ({"pad_token_id": 53}, ("pad_token_id: 53", "53 tokens")),
        ({"num_hidden_layers": 2}, ("3 layers", "the model 2")),
        ({"layers": [{"expression": "gelu(x", "stack": 1, "ratio": [1, 1]}] * 3}, ("layers[0].expression",)),
        ({"layers": [{"expression": TRUNCATE[0], "stack": -1, "ratio": [1, 1]}] * 3}, ("layers[0].stack",)),
        ({"layers": [{"expression": TRUNCATE[0], "ratio": [1, 1]}] * 3}, ("layers[0]", "stack is missing")),
        ({"layers": 7}, ("layers: must be a list", "7")),
        ({"layers": "linear1_32(gelu(linear1_32(x,wb1)),wb2), " * 3 + "x"}, ("layer 3",)),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError) as error:
        small_config(**changes)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_config_made_wrong_afterwards_is_refused_by_the_model():
    config = small_config()
    config.num_attention_heads = 2
    with pytest.raises(UserError, match="num_attention_heads: 2"):
        FFNASModel(config)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(UserError, match="25 tokens, the model has 24 positions"):
        make()(torch.ones(1, 25, dtype=torch.long))


def test_config_layers_read_in_every_form_and_survive_json(tmp_path):
    arch = architecture([(TRUNCATE[0], 1, 2), (TRUNCATE[3], 2, 3), (TRUNCATE[1], 4, 4)])
    config = small_config(layers=arch, num_labels=3)
    config.save_pretrained(tmp_path)
    loaded = FFNASConfig.from_pretrained(tmp_path)
    assert loaded.full_architecture == arch
    assert loaded.to_dict() == config.to_dict()
    assert small_config(layers=str(arch)).layers == config.layers == small_config(layers=config.layers).layers
    assert small_config(layers=None).full_architecture == architecture([(TRUNCATE[0], 1, 1)] * 3)


RELEASED_MODELS = {
    "efficientbert": (ModelShape(540, 6, 540, teacher_hidden_size=768), 1, 12, "truncate", 15_737_724),
    "tiny": (ModelShape(360, 6, 360, teacher_hidden_size=768), 1, 12, "truncate", 9_375_144),
    "plusplus": (ModelShape(360, 12, 360, teacher_hidden_size=768), 2, 12, "truncate", 14_241_864),
    "tinybert6": (ModelShape(768, 6, 3072, embedding_size=None, teacher_hidden_size=768), 1, 12, "pad", 70_116_608),
}


@pytest.mark.parametrize("name", RELEASED_MODELS)
def test_real_modules_have_the_published_parameter_counts(name):
    shape, repeat, heads, policy, published = RELEASED_MODELS[name]
    arch = Architecture(tuple(layer for layer in Architecture.parse(RELEASED).layers for _ in range(repeat)))
    with torch.device("meta"):
        model = build_student(shape, arch, heads, policy=policy)
    real = sum(p.numel() for n, p in model.ffnas.named_parameters() if not n.startswith("cls_pooler"))
    assert real == count_parameters(arch, shape) == published


@pytest.mark.parametrize("fit_dense", [True, False])
def test_real_modules_have_the_counts_of_the_formula(fit_dense):
    rng = np.random.default_rng(1)
    for embedding in (7, None):
        shape = ModelShape(15, 3, 13, 53, embedding, 24, 3, 11 if fit_dense else None)
        for _ in range(4):
            arch = random_architecture(rng)
            with torch.device("meta"):
                model = FFNASModel(build_student(shape, arch, 3).config, add_pooling_layer=False)
            assert model.num_parameters() == count_parameters(arch, shape, fit_dense=fit_dense)


def test_bfloat16_stays_close_to_float64():
    model = make()
    ids, mask, types = batch()
    exact = model(ids, mask, types).last_hidden_state
    low = copy.deepcopy(model).to(torch.bfloat16)(ids, mask, types).last_hidden_state
    assert low.dtype == torch.bfloat16
    # bf16 keeps 8 bits: each of about 20 roundings in sequence errs by 2^-9 relative, outputs are of order 1
    assert (low.double() - exact)[mask].abs().mean() < 20 * 2**-9


def test_autocast_trains_float32_weights():
    model = make().float().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(*batch()).last_hidden_state
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for n, p in model.encoder.named_parameters())


def test_dropout_follows_the_global_seed_and_evaluation_mode():
    model = make(hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.2).train()
    inputs = batch()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(*inputs).last_hidden_state)
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(model.eval()(*inputs).last_hidden_state, model(*inputs).last_hidden_state)


def test_deepcopy_is_independent():
    model = FFNASForSequenceClassification(small_config())
    other = copy.deepcopy(model)
    other.ffnas.encoder[0].all_ffn[0].dense1.weight.data.zero_()
    assert model.ffnas.encoder[0].all_ffn[0].dense1.weight.abs().sum() > 0
    assert other.ffnas.planner.config is other.ffnas.config


def test_a_traced_model_gives_logits_and_gradients_for_other_lengths():
    model = randomize(FFNASForSequenceClassification(small_config(num_labels=3))).eval()
    model.config.return_dict = False
    ids, mask, _ = batch()
    traced = torch.jit.trace(model, (ids, mask))
    shorter, real = ids[:2, :4], mask[:2, :4].clone()
    real[:, 3] = False
    own, expected = (m(shorter, real)[0] for m in (traced, model))
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        *(torch.autograd.grad(y.square().sum(), model.classifier.weight) for y in (own, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
