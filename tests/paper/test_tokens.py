"""Texts under `paper_exact`: pairs cut token by token as the published code does, Chinese characters left in words."""

from __future__ import annotations

import itertools

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from engine.data import TaskSpec, encode_task
from engine.data.encode_published import kept_lengths
from engine.data.rows import Rows
from engine.model_sources import load_tokenizer, resolve
from engine.teacher import Teacher

WORDS = ["a", "b", "c", "東", "##京", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tokens")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(vocab_size=11, hidden_size=12, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12)
    BertModel(config).save_pretrained(folder)
    return folder


def published_cut(first, second, longest):
    """One token at a time, of the first text only while it is the longer one; three places are special tokens'."""
    while len(first) + len(second) + 3 > longest:
        if len(first) > len(second):
            first = first[:-1]
        else:
            second = second[:-1]
    return first, second


def test_lengths_kept_of_every_pair():
    for a, b, longest in itertools.product(range(9), range(9), range(5, 16)):
        first, second = published_cut("a" * a, "b" * b, longest)
        assert kept_lengths(a, b, longest - 3) == (len(first), len(second)), (a, b, longest)


@pytest.mark.parametrize("longest", [8, 9, 12])
def test_pairs_are_cut_as_published(folder, longest):
    tokenizer = load_tokenizer(resolve(str(folder)), published=True)
    spec = TaskSpec("t", "classification", ("a", "b"), "label", ("x", "y"))
    texts = [(["a"] * n, ["b"] * m) for n, m in itertools.product(range(1, 9), repeat=2)]
    rows = Rows(([" ".join(t) for t, _ in texts], [" ".join(t) for _, t in texts]))
    data = encode_task(rows, spec, tokenizer, longest, published=True)
    a, b, cls, sep = (tokenizer.convert_tokens_to_ids(t) for t in ("a", "b", "[CLS]", "[SEP]"))
    for i, (first, second) in enumerate(texts):
        first, second = published_cut(first, second, longest)
        assert data.row(i).tolist() == [cls, *[a] * len(first), sep, *[b] * len(second), sep]
        assert data.second[i] == len(first) + 2
    assert data.truncated == sum(len(f) + len(s) + 3 > longest for f, s in texts)
    # 3 + 3 tokens to 8, with and without
    row = next(i for i, (f, s) in enumerate(texts) if len(f) == len(s) == 3)
    plain = encode_task(rows, spec, tokenizer, 8)
    if longest == 8:
        assert data.row(row).tolist().count(a) == 3
        assert plain.row(row).tolist().count(a) == 2


def test_chinese_characters_stay_in_their_word(folder, tmp_path):
    own, published = (load_tokenizer(resolve(str(folder)), published=flag) for flag in (False, True))
    assert own.tokenize("東a") == ["東", "a"]
    assert published.tokenize("東a") == ["[UNK]"]  # no piece ##a
    assert published.tokenize("東京 x") == ["東", "##京", "x"]
    published.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("東a") == ["[UNK]"]


def test_a_teacher_keeps_the_published_tokenizer(folder, tmp_path):
    teacher = Teacher.load(folder, published=True)
    assert teacher.tokenizer.tokenize("東a") == ["[UNK]"]
    teacher.save(tmp_path)
    again = Teacher.load(tmp_path)
    assert again.tokenizer.tokenize("東a") == ["[UNK]"]
    assert again.model.config.hidden_act == "gelu_pytorch_tanh"
    assert again.model.config.layer_norm_eps == 1e-5
