"""An exported directory is an ordinary Hugging Face model: loads, predicts, explains itself, appears whole or not."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from encoder_reference import TRUNCATE, architecture, randomize, small_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from engine.architecture.file import load_architecture
from engine.architecture.params import count_parameters
from engine.errors import UserError
from engine.export.card import model_card
from engine.export.export import export_model
from engine.student import FFNASForMaskedLM, FFNASForSequenceClassification

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a", "very"]
LARGEST = architecture([(TRUNCATE[0], 3, 1)] * 3)
FOUND = architecture([(TRUNCATE[1], 1, 2), (TRUNCATE[3], 2, 3), (TRUNCATE[2], 3, 1)])
CARD = {
    "name": "tiny-ffnas",
    "task": "sentiment of short texts",
    "teacher": "a tiny teacher",
    "license": "apache-2.0",
    "metric": {"name": "accuracy", "value": 0.78125, "split": "dev"},
    "metrics": {"accuracy": 0.78125, "f1": 0.75},
    "trials": {"stage 1": 12, "stage 2": 8},
    "seed": 7,
}
TEXTS = ["good film", "a very bad film", "film"]


@pytest.fixture
def supernet():
    model = FFNASForSequenceClassification(
        small_config(layers=LARGEST, id2label={0: "neg", 1: "pos"}, label2id={"neg": 0, "pos": 1})
    )
    randomize(model).get_input_embeddings().weight.data[0] = 0  # as in every model not loaded from elsewhere
    return model.eval()


@pytest.fixture(params=["word-piece", "generic"])
def tokenizer(request, tmp_path):
    if request.param == "word-piece":
        file = tmp_path / "vocab.txt"
        file.write_text("\n".join(WORDS))
        return BertTokenizer(vocab=str(file))
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", **special)


def test_an_exported_model_predicts_as_the_subnet_did(supernet, tokenizer, tmp_path):
    out = tmp_path / "model"
    export_model(supernet, tokenizer, out, FOUND, CARD, architecture_file=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(out)
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = supernet(**encoded, architecture=FOUND).logits
    again = AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(again["input_ids"], encoded["input_ids"])
    assert torch.equal(loaded(**again).logits, expected)
    assert loaded.fit_dense is None
    answers = pipeline("text-classification", model=str(out))(TEXTS)
    assert [a["label"] for a in answers] == [("neg", "pos")[i] for i in expected.argmax(-1).tolist()]
    for answer, row in zip(answers, expected.softmax(-1), strict=True):
        assert answer["score"] == pytest.approx(row.max().item(), abs=1e-5)  # the pipeline pads otherwise


def test_long_texts_are_truncated_to_the_models_positions(supernet, tokenizer, tmp_path):
    limit = tokenizer.model_max_length
    export_model(supernet, tokenizer, tmp_path / "model", FOUND, CARD)
    assert tokenizer.model_max_length == limit
    classify = pipeline("text-classification", model=str(tmp_path / "model"))
    assert classify.tokenizer.model_max_length == 24
    assert len(classify(["good film " * 40], truncation=True)) == 1


def test_the_directory_holds_what_it_says(supernet, tokenizer, tmp_path):
    out = tmp_path / "model"
    export_model(supernet, tokenizer, out, FOUND, CARD, architecture_file=True)
    names = {path.name for path in out.iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "architecture.json", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert config["teacher_hidden_size"] is None
    shape = supernet.config.shape
    assert load_architecture(out / "architecture.json", shape=shape) == FOUND
    saved = json.loads((out / "architecture.json").read_text())
    assert saved["params"] == count_parameters(FOUND, shape, fit_dense=False)


def test_the_card_tells_layers_sizes_score_and_origin(supernet, tmp_path):
    export_model(supernet, None, tmp_path / "model", FOUND, CARD)
    text = (tmp_path / "model" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["pipeline_tag"] == "text-classification"
    assert head["license"] == "apache-2.0"
    assert "# tiny-ffnas" in text
    for layer in FOUND.layers:
        assert f"`{layer.expression}` | {layer.stack} | {layer.ratio} |" in text
    assert str(FOUND) in text
    assert f"{count_parameters(FOUND, supernet.config.shape, fit_dense=False):,} parameters" in text
    assert "| accuracy | 0.7812 | dev |" in text
    assert "| f1 | 0.7500 | dev |" in text
    assert "- trials: stage 1 12, stage 2 8" in text
    assert "import engine" in text
    assert not (tmp_path / "model" / "architecture.json").exists()


def test_an_empty_card_is_enough():
    text = model_card(FFNASForMaskedLM(small_config()), {})
    assert "fill-mask" in text
    assert "Scores" not in text


def test_an_existing_directory_is_replaced_whole(supernet, tmp_path):
    out = tmp_path / "model"
    export_model(supernet, None, out, FOUND, CARD, architecture_file=True)
    export_model(supernet, None, out, None, {})
    assert not (out / "architecture.json").exists()
    assert AutoModelForSequenceClassification.from_pretrained(out).config.full_architecture == LARGEST


@pytest.mark.parametrize("failing", ["architecture", "card"])
def test_a_failed_export_leaves_nothing_behind(supernet, failing, tmp_path):
    out = tmp_path / "model"
    export_model(supernet, None, out, FOUND, CARD)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wrong = architecture([(TRUNCATE[0], 4, 1)] * 3) if failing == "architecture" else FOUND
    card = {"metric": {"name": "accuracy", "value": "high"}} if failing == "card" else CARD
    with pytest.raises((UserError, ValueError)):
        export_model(supernet, None, out, wrong, card)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
