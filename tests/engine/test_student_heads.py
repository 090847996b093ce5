"""Task heads: outputs and losses written out by hand, transformers' conventions, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from encoder_reference import batch, encode, gelu, layer_norm, linear, parameters, randomize, small_config
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from engine.errors import UserError
from engine.student import (
    FFNASForMaskedLM,
    FFNASForMultipleChoice,
    FFNASForQuestionAnswering,
    FFNASForSequenceClassification,
    FFNASModel,
)

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
"""float64 against float64, sums in another order."""

AUTO = {
    AutoModel: FFNASModel,
    AutoModelForMaskedLM: FFNASForMaskedLM,
    AutoModelForMultipleChoice: FFNASForMultipleChoice,
    AutoModelForQuestionAnswering: FFNASForQuestionAnswering,
    AutoModelForSequenceClassification: FFNASForSequenceClassification,
}


def make(cls, **changes):
    return randomize(cls(small_config(**changes)).double()).eval()


def last_hidden(model, inputs):
    config = model.config
    plan = [("linear(gelu(linear(x,wb1)),wb2)", 2, config.intermediate_size)] * 3
    return encode(parameters(model), config, plan, *inputs)[1][-1]


def pooled(model, inputs):
    return torch.tanh(linear(last_hidden(model, inputs)[:, 0], parameters(model), "cls_pooler.dense"))


def test_classifier_logits_and_cross_entropy():
    model, inputs = make(FFNASForSequenceClassification, num_labels=4), batch()
    labels = torch.tensor([0, 3, 2])
    out = model(*inputs, labels=labels)
    logits = linear(pooled(model, inputs), parameters(model), "classifier")
    torch.testing.assert_close(out.logits, logits, **CLOSE)
    expected = -(logits - logits.logsumexp(-1, keepdim=True))[range(3), labels].mean()
    torch.testing.assert_close(out.loss, expected, **CLOSE)


def test_one_label_is_a_regression_on_float_targets():
    model, inputs = make(FFNASForSequenceClassification, num_labels=1), batch()
    labels = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float32)
    out = model(*inputs, labels=labels)
    expected = (linear(pooled(model, inputs), parameters(model), "classifier")[:, 0] - labels).square().mean()
    torch.testing.assert_close(out.loss, expected, **CLOSE)
    torch.testing.assert_close(model(*inputs, labels=labels[:, None]).loss, expected, **CLOSE)


def test_float_labels_of_several_classes_are_multi_label():
    model, inputs = make(FFNASForSequenceClassification, num_labels=2), batch()
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    out = model(*inputs, labels=labels)
    p = torch.sigmoid(out.logits)
    torch.testing.assert_close(out.loss, -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(), **CLOSE)


def test_problem_type_decides_before_the_labels_do():
    model, inputs = make(FFNASForSequenceClassification, num_labels=3, problem_type="regression"), batch()
    labels = torch.randn(3, 3)
    out = model(*inputs, labels=labels)
    torch.testing.assert_close(out.loss, (out.logits - labels).square().mean(), **CLOSE)


def test_question_answering_leaves_out_positions_past_the_end():
    model, inputs = make(FFNASForQuestionAnswering), batch()
    start, end = torch.tensor([1, 99, 0]), torch.tensor([2, 99, 4])
    out = model(*inputs, start_positions=start, end_positions=end)
    logits = linear(last_hidden(model, inputs), parameters(model), "qa_outputs")
    real = inputs[1]
    torch.testing.assert_close(out.start_logits[real], logits[..., 0][real], **CLOSE)
    torch.testing.assert_close(out.end_logits[real], logits[..., 1][real], **CLOSE)
    kept = [0, 2]
    losses = [F.cross_entropy(a[kept], b[kept]) for a, b in ((out.start_logits, start), (out.end_logits, end))]
    torch.testing.assert_close(out.loss, sum(losses) / 2, **CLOSE)


def test_multiple_choice_scores_each_choice_alone():
    model = make(FFNASForMultipleChoice)
    rows = batch(rows=6)
    out = model(*(value.reshape(2, 3, 8) for value in rows), labels=torch.tensor([2, 0]))
    scores = linear(pooled(model, rows), parameters(model), "classifier").reshape(2, 3)
    torch.testing.assert_close(out.logits, scores, **CLOSE)
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, torch.tensor([2, 0])), **CLOSE)


@pytest.mark.parametrize("embedding_type", ["trigram", "factorized", "full"])
def test_masked_lm_decodes_with_the_token_table(embedding_type):
    model, inputs = make(FFNASForMaskedLM, embedding_type=embedding_type), batch()
    labels = inputs[0].masked_fill(torch.arange(8) % 3 != 0, -100).masked_fill(~inputs[1], -100)
    out = model(*inputs, labels=labels)
    p = parameters(model)
    table = p["embeddings.token_embeddings.weight"]
    assert model.lm_head.decoder.weight is table
    body = layer_norm(gelu(linear(last_hidden(model, inputs), p, "lm_head.dense")), p, "lm_head.layernorm", 1e-12)
    logits = body @ table.T + p["lm_head.decoder.bias"]
    real = inputs[1]
    torch.testing.assert_close(out.logits[real], logits[real], **CLOSE)
    chosen = labels != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(logits[chosen], labels[chosen]), **CLOSE)


@pytest.mark.parametrize("auto", AUTO, ids=lambda auto: auto.__name__)
def test_save_and_load_round_trip(auto, tmp_path):
    model = randomize(AUTO[auto](small_config(num_labels=3))).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_damaged_config_is_named_by_from_pretrained(tmp_path):
    FFNASModel(small_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    for auto in (AutoConfig, AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(UserError, match="num_attention_heads: 4 does not divide hidden_size 15; use 3 heads"):
            auto.from_pretrained(tmp_path)


def test_an_encoder_loads_into_a_head_and_back(tmp_path):
    model = randomize(FFNASForSequenceClassification(small_config())).eval()
    model.save_pretrained(tmp_path / "head")
    encoder = AutoModel.from_pretrained(tmp_path / "head")
    inputs = batch()
    assert torch.equal(encoder(*inputs).last_hidden_state, model.ffnas(*inputs).last_hidden_state)
    encoder.save_pretrained(tmp_path / "encoder")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")
    assert torch.equal(again.ffnas(*inputs).last_hidden_state, model.ffnas(*inputs).last_hidden_state)
    assert again.lm_head.decoder.weight is again.ffnas.embeddings.token_embeddings.weight


def test_the_token_table_can_be_resized():
    model = FFNASForMaskedLM(small_config())
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == 60
    assert model.get_input_embeddings().weight.shape == (60, 7)
    assert torch.equal(model.get_input_embeddings().weight[:53], before)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    assert model(torch.tensor([[59, 1, 2]])).logits.shape == (1, 3, 60)


def test_initial_weights_are_berts():
    model = FFNASForSequenceClassification(small_config(vocab_size=2000, hidden_size=60, intermediate_size=60))
    for name, value in model.named_parameters():
        if name.endswith("layernorm.weight"):
            assert (value == 1).all(), name
        elif name.endswith("bias"):
            assert (value == 0).all(), name
        elif value.numel() > 2000:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name


def test_return_dict_false_gives_tuples():
    model, inputs = make(FFNASForSequenceClassification), batch()
    loss, logits = model(*inputs, labels=torch.tensor([0, 1, 1]), return_dict=False)
    assert loss.shape == ()
    assert logits.shape == (3, 2)
