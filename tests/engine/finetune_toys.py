"""A tiny teacher and a task it can learn, for the tests of fine-tuning; fixtures that they import."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from engine.data import EncodedTask, Rows, TaskSpec, encode_task, encode_text
from engine.teacher import FinetuneSettings, Teacher

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
CLASSES = TaskSpec("letters", "classification", ("text",), "label", ("low", "middle", "high"))
NUMBERS = TaskSpec("letters", "regression", ("text",), "label", metric="pearson")
FRESH = {"freeze_embeddings": False}
"""The source's tables are random: nothing could be learned on them."""
QUICK = FinetuneSettings(epochs=8, lr=3e-3, batch_size=16, **FRESH)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny BERT without a head, with its tokenizer."""
    folder = tmp_path_factory.mktemp("source")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def task(source):
    return make_task(source, CLASSES)


def make_task(source, spec, seed=0):
    """The label is the third of the alphabet that the first letter comes from (regression: its place)."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def rows(count):
        drawn = generator.integers(0, 26, (count, 6))
        texts = [" ".join(letters[row[: generator.integers(1, 7)]]) for row in drawn]
        place = drawn[:, 0]
        labels = (place / 25).astype(np.float32) if spec.kind == "regression" else (place * 3 // 26).astype(np.int64)
        return Rows((texts,), labels)

    tokenizer = Teacher.load(source).tokenizer
    splits = {
        name: encode_task(rows(n), spec, tokenizer, 16)
        for name, n in (("train", 160), ("score", 16), ("select", 48), ("dev", 16))
    }
    return EncodedTask(spec, text=encode_text(["a b c"], tokenizer, 16), **splits)


def weights_of(teacher):
    return {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
