"""Moving weights between a supernet and models of its subnets: equal outputs, equal gradients, clear refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from encoder_reference import TRUNCATE, architecture, batch, random_architecture, randomize, small_config, small_shape

from engine.data import TaskSpec
from engine.errors import UserError
from engine.student import FFNASForMaskedLM, FFNASForQuestionAnswering, FFNASForSequenceClassification, FFNASModel
from engine.student.supernet import build_student, extract, inherit

LARGEST = architecture([(TRUNCATE[0], 3, 1)] * 3)
SUBNET = architecture([(TRUNCATE[1], 1, 2), (TRUNCATE[3], 2, 3), (TRUNCATE[2], 3, 1)])
TASK = TaskSpec("toy", "classification", ("text",), "label", ("bad", "so-so", "good"))


def make_supernet(cls=FFNASForSequenceClassification, seed=0, **changes):
    return randomize(cls(small_config(layers=LARGEST, **changes)), seed).eval()


def gradients(model, inputs, arch=None):
    model.zero_grad(set_to_none=True)
    out = model.states(*inputs, architecture=arch)
    (out.logits.square().sum() + sum(h.square().sum() for h in out.hidden)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("embedding_type", ["trigram", "factorized", "full"])
def test_extracted_models_compute_bit_for_bit_what_the_subnet_does(dtype, embedding_type):
    rng = np.random.default_rng(0)
    supernet = make_supernet(embedding_type=embedding_type, hidden_size=45, intermediate_size=41).to(dtype)
    inputs = batch()
    for _ in range(6):
        arch = random_architecture(rng)
        model = extract(supernet, arch)
        assert model.config.full_architecture == arch
        assert model.dtype == dtype
        assert torch.equal(model(*inputs).logits, supernet(*inputs, architecture=arch).logits)
        whole, own = gradients(supernet, inputs, arch), gradients(model, inputs)
        for name, gradient in own.items():
            view = whole[name][tuple(slice(size) for size in gradient.shape)]
            assert torch.equal(gradient, view), name


def test_an_extracted_model_stands_alone():
    supernet = make_supernet()
    before = copy.deepcopy(supernet.state_dict())
    model = extract(supernet, SUBNET).train()
    assert supernet.training is False
    assert model.num_parameters() < supernet.num_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.is_contiguous()
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert supernet.config.full_architecture == LARGEST


def test_the_projection_is_dropped_unless_asked_for():
    supernet = make_supernet()
    plain, kept = extract(supernet, SUBNET), extract(supernet, SUBNET, fit_dense=True)
    assert plain.fit_dense is None
    assert plain.config.teacher_hidden_size is None
    assert torch.equal(kept.fit_dense.weight, supernet.fit_dense.weight)


@pytest.mark.parametrize("cls", [FFNASModel, FFNASForMaskedLM, FFNASForQuestionAnswering])
def test_every_class_can_be_extracted(cls):
    supernet = make_supernet(cls, attn_implementation="eager")
    model = extract(supernet, SUBNET)
    assert type(model) is cls
    assert model.config._attn_implementation == "eager"
    inputs = batch()
    assert torch.equal(model(*inputs)[0], supernet(*inputs, architecture=SUBNET)[0])
    if cls is FFNASForMaskedLM:
        assert model.lm_head.decoder.weight is model.get_input_embeddings().weight


def test_an_encoder_without_pooler_is_extracted_without_one():
    base = FFNASModel(small_config(layers=LARGEST), add_pooling_layer=False)
    assert extract(base, SUBNET).cls_pooler is None


def test_no_architecture_extracts_everything_stored():
    supernet = make_supernet()
    inputs = batch()
    model = extract(supernet, None)
    assert model.config.full_architecture == LARGEST
    assert torch.equal(model(*inputs).logits, supernet(*inputs).logits)


def test_extracting_leaves_the_random_state_alone():
    supernet = make_supernet()
    state = torch.get_rng_state()
    extract(supernet, SUBNET)
    assert torch.equal(torch.get_rng_state(), state)


def test_more_than_is_stored_cannot_be_extracted():
    with pytest.raises(UserError, match="stack 4 is more than the 3"):
        extract(make_supernet(), architecture([(TRUNCATE[0], 4, 1)] * 3))


def test_inherited_weights_give_the_subnets_outputs_and_keep_the_optimizer_valid():
    supernet = make_supernet(num_labels=3)
    target = build_student(small_shape(), SUBNET, 3, TASK, seed=1).eval()
    parameters = list(target.parameters())
    assert inherit(target, supernet) == []
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    inputs = batch()
    ours, theirs = target.states(*inputs), supernet.states(*inputs, architecture=SUBNET)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(target.fit_dense(ours.hidden[-1]), supernet.fit_dense(theirs.hidden[-1]))


def test_inheriting_by_another_head_leaves_that_head_as_it_was():
    supernet = make_supernet(FFNASForMaskedLM)
    target = build_student(small_shape(teacher_hidden_size=None), SUBNET, 3, TASK, seed=1)
    head = target.classifier.weight.detach().clone()
    left = inherit(target, supernet)
    assert sorted(left) == [
        "classifier.bias",
        "classifier.weight",
        "ffnas.cls_pooler.dense.bias",
        "ffnas.cls_pooler.dense.weight",
    ]
    assert torch.equal(target.classifier.weight, head)
    assert torch.equal(
        target.ffnas.encoder[2].all_ffn[2].dense1.weight, supernet.ffnas.encoder[2].all_ffn[2].dense1.weight
    )


def test_a_head_with_other_labels_is_left_as_it_was():
    left = inherit(build_student(small_shape(), SUBNET, 3, TASK), make_supernet(num_labels=2))
    assert left == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ffn_size": 17}, ("dense1", "[13, 15]")),
        ({"num_layers": 4}, ("encoder.3",)),
        ({"embedding_size": None}, ("token_embeddings",)),
        ({"vocab_size": 50}, ("token_embeddings", "[53, 7]", "[50, 7]")),
    ],
)
def test_a_target_of_other_sizes_is_refused_and_left_unchanged(changes, words):
    shape = small_shape(**changes)
    target = build_student(shape, architecture([(TRUNCATE[0], 1, 1)] * shape.num_layers), 3, seed=1)
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(UserError) as error:
        inherit(target, make_supernet())
    assert all(word in str(error.value) for word in words), error.value
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_a_built_student_has_the_tasks_labels_and_seeded_weights():
    state = torch.get_rng_state()
    first, second, third = (build_student(small_shape(), SUBNET, 3, TASK, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.config.id2label == {0: "bad", 1: "so-so", 2: "good"}
    assert first.config.label2id["good"] == 2
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, third.classifier.weight)
    regression = TaskSpec("score", "regression", ("text",), "label", (), "pearson")
    assert build_student(small_shape(), None, 3, regression).config.problem_type == "regression"
    assert build_student(small_shape(), None, 3, hidden_dropout_prob=0.0).config.hidden_dropout_prob == 0.0
