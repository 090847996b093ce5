"""Published families as models of ours: equal to transformers' own models, at odd sizes and with padding."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from engine.data import TaskSpec
from engine.errors import UserError
from engine.student import FFNASForQuestionAnswering, FFNASForSequenceClassification, FFNASModel
from engine.student.from_encoder import reason_against, standard_model

SIZES = {
    "vocab_size": 41, "hidden_size": 15, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 23,
    "max_position_embeddings": 17,
}  # fmt: skip
KIN = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
DISTIL = {"vocab_size": 41, "dim": 15, "n_layers": 2, "n_heads": 3, "hidden_dim": 23, "max_position_embeddings": 17}
NAMES = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
CONFIGS = {
    "bert": BertConfig(**SIZES, **NAMES, classifier_dropout=0.3),
    "bert, tanh gelu": BertConfig(**SIZES, **NAMES, hidden_act="gelu_new", layer_norm_eps=1e-3),
    "bert, relu": BertConfig(**SIZES, **NAMES, hidden_act="relu", type_vocab_size=3),
    "roberta": RobertaConfig(**KIN, **NAMES),
    "xlm-roberta": XLMRobertaConfig(**KIN, **NAMES, attention_probs_dropout_prob=0.2),
    "camembert": CamembertConfig(**KIN, **NAMES),
    "electra": ElectraConfig(**SIZES, **NAMES, embedding_size=15, hidden_dropout_prob=0.2),
    "distilbert": DistilBertConfig(**DISTIL, **NAMES),
    "distilbert, sinusoidal": DistilBertConfig(**{**DISTIL, "dim": 18}, **NAMES, sinusoidal_pos_embds=True),
}
HEADS = {
    None: AutoModel,
    "classification": AutoModelForSequenceClassification,
    "question_answering": AutoModelForQuestionAnswering,
    "multiple_choice": AutoModelForMultipleChoice,
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""float32, attention and sums in other kernels."""
TASK = TaskSpec("t", "classification", ("text",), "label", ("a", "b", "c"))


def make(name, head=None, seed=0):
    """Weights, biases and norms all generic: nothing is multiplied by 0 or 1."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    if head == "question_answering":
        config.num_labels = 2
    model = HEADS[head].from_config(config).eval()
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape))
            if "position_embeddings" in key:
                parameter.add_(torch.arange(len(parameter))[:, None] * 0.05)
    return model


def inputs_of(model, lengths=(11, 5, 1)):
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, 41, mask.shape, generator=generator).masked_fill(~mask, model.config.pad_token_id)
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments > 1:
        inputs["token_type_ids"] = torch.randint(0, segments, ids.shape, generator=generator) * mask
    return inputs, mask


@pytest.mark.parametrize("name", CONFIGS)
def test_hidden_states_are_equal(name):
    model = make(name)
    ours = standard_model(model)
    assert isinstance(ours, FFNASModel)
    inputs, real = inputs_of(model)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        got = ours(**inputs, output_hidden_states=True)
    assert len(got.hidden_states) == len(expected.hidden_states)
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], **CLOSE)
    pooled = getattr(expected, "pooler_output", None)
    assert (got.pooler_output is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(got.pooler_output, pooled, **CLOSE)
    assert str(ours.config.full_architecture.layers[0].expression).startswith("linear(")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_their_own_heads_are_equal(name):
    model = make(name, "classification")
    ours = standard_model(model)
    assert isinstance(ours, FFNASForSequenceClassification)
    inputs, _ = inputs_of(model)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits, **CLOSE)
    assert ours.config.id2label == NAMES["id2label"]
    assert ours.config.label2id == NAMES["label2id"]


@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert"])
def test_spans_and_choices_are_equal(name):
    model = make(name, "question_answering")
    inputs, real = inputs_of(model)
    ours = standard_model(model)
    with torch.no_grad():
        for part in ("start_logits", "end_logits"):
            torch.testing.assert_close(ours(**inputs)[part][real], model(**inputs)[part][real], **CLOSE)
    model = make(name, "multiple_choice")
    ours = standard_model(model)
    inputs, _ = inputs_of(model, (9, 4, 7, 2))
    inputs = {key: value.reshape(2, 2, -1) for key, value in inputs.items()}
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**inputs).logits, **CLOSE)


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_epsilon_and_sizes_are_theirs(name):
    model, config = make(name, "classification"), CONFIGS[name]
    ours = standard_model(model).config
    distil = config.model_type == "distilbert"
    assert ours.hidden_dropout_prob == (config.dropout if distil else config.hidden_dropout_prob)
    attention = config.attention_dropout if distil else config.attention_probs_dropout_prob
    assert ours.attention_probs_dropout_prob == attention
    assert ours.layer_norm_eps == (1e-12 if distil else config.layer_norm_eps)
    assert ours.classifier_dropout == (0.2 if distil else config.classifier_dropout)
    offset = 2 if "roberta" in config.model_type or config.model_type == "camembert" else 0
    assert ours.max_position_embeddings == 17 - offset
    assert (ours.num_hidden_layers, ours.intermediate_size) == (config.num_hidden_layers, 23)


def test_the_whole_length_can_be_used_and_not_more():
    model = make("roberta")
    ours = standard_model(model)
    ids = torch.randint(5, 41, (2, 15))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).last_hidden_state, model(ids).last_hidden_state, **CLOSE)
    with pytest.raises(UserError, match="sequences of 16 tokens, the model has 15 positions"):
        ours(torch.randint(5, 41, (1, 16)))


def test_weights_are_copies_and_mode_and_dtype_are_kept():
    model = make("bert", "classification").double().train()
    ours = standard_model(model)
    assert ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not [p for p in ours.parameters() if p.data_ptr() in theirs]
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())
    assert ours.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("task", [None, TASK])
def test_a_sentence_encoder_pools_the_mean(task):
    model = make("bert")
    ours = standard_model(model, task, pooling="mean", seed=3)
    inputs, real = inputs_of(model)
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
        mean = torch.stack([row[keep].mean(0) for row, keep in zip(hidden, real, strict=True)])
        if task is None:
            torch.testing.assert_close(ours(**inputs).pooler_output, mean, **CLOSE)
            return
        expected = mean @ ours.classifier.weight.T
        torch.testing.assert_close(ours(**inputs).logits, expected, **CLOSE)
    again, other = (standard_model(model, task, pooling="mean", seed=seed) for seed in (3, 4))
    assert torch.equal(ours.classifier.weight, again.classifier.weight)
    assert not torch.equal(ours.classifier.weight, other.classifier.weight)
    assert ours.config.classifier_dropout == ours.dropout.p == 0.1
    assert ours.config.id2label == {0: "a", 1: "b", 2: "c"}
    large = standard_model(BertModel(BertConfig(**{**SIZES, "hidden_size": 300})), TASK, pooling="mean")
    assert large.classifier.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_bare_encoder_gets_a_fresh_head_for_a_task():
    spans = TaskSpec("s", "question_answering", ("question", "context"), "answers", metric="f1")
    assert isinstance(standard_model(make("electra"), spans), FFNASForQuestionAnswering)
    ours = standard_model(make("electra"), TASK)
    assert (ours.classifier.bias == 0).all()
    assert ours.ffnas.cls_pooler.dense.weight.std() > 0
    inputs, _ = inputs_of(make("electra"))
    assert ours(**inputs).logits.shape == (3, 3)


def test_conversion_leaves_the_global_generator_alone():
    model = make("bert")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    standard_model(model, TASK)
    assert torch.equal(torch.rand(1), expected)


ROTARY = {**SIZES, "hidden_size": 12, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: AutoModel.from_config(AlbertConfig(**SIZES, embedding_size=12)), "albert: its layers share"),
        (lambda: AutoModel.from_config(ModernBertConfig(**ROTARY)), "modernbert: it has rotary positions"),
        (lambda: AutoModel.from_config(MPNetConfig(**SIZES)), "mpnet: its attention scores have a position bias"),
        (lambda: AutoModel.from_config(ElectraConfig(**SIZES, embedding_size=12)), "embeddings are narrower"),
        (lambda: AutoModel.from_config(BertConfig(**SIZES, hidden_act="mish")), "activation 'mish' is not known"),
        (lambda: AutoModel.from_config(BertConfig(**SIZES, is_decoder=True)), "bert: it is a decoder"),
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), "BertForMaskedLM has a head of another kind"),
    ],
    ids=["albert", "modernbert", "mpnet", "electra", "activation", "decoder", "head"],
)
def test_what_is_not_known_is_named(model, words):
    made = model()
    assert words in reason_against(made)
    with pytest.raises(UserError, match="cannot be taken apart into layers") as caught:
        standard_model(made)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
