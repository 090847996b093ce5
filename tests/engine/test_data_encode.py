"""Encoding rows and text: equal to the tokenizer's own call, within limits, without crossing documents."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from data_toys import bert_tokenizer, roberta_tokenizer, sentences

from engine.data import Rows, TaskSpec, check_max_length, encode_task, encode_text, model_positions, tokenizing
from engine.data.text import split_sentences
from engine.data.tokenizing import BLOCK
from engine.errors import UserError

SINGLE = TaskSpec("t", "classification", ("text",), "label", ("no", "yes"))
PAIR = TaskSpec("t", "regression", ("a", "b"), "score", metric="pearson")


@pytest.fixture(params=[bert_tokenizer, roberta_tokenizer], ids=["bert", "roberta"])
def tokenizer(request):
    return request.param()


@pytest.mark.parametrize("max_length", [8, 13, 128])
@pytest.mark.parametrize("pair", [False, True], ids=["single", "pair"])
def test_rows_equal_the_tokenizers_own_call(tokenizer, pair, max_length):
    columns = [sentences(45, seed=1, high=30)] + ([sentences(45, seed=2)] if pair else [])
    columns[0][3] = ""
    labels = np.arange(45) % 2 if not pair else np.linspace(0, 5, 45, dtype=np.float32)
    data = encode_task(Rows(tuple(columns), labels), PAIR if pair else SINGLE, tokenizer, max_length)
    wanted = tokenizer(*columns, truncation="longest_first", max_length=max_length, return_token_type_ids=True)
    whole = tokenizer(*columns)["input_ids"]
    assert [data.row(i).tolist() for i in range(45)] == wanted["input_ids"]
    assert data.truncated == sum(len(row) > max_length for row in whole)
    assert data.labels.dtype == (np.float32 if pair else np.int64)
    batch = next(iter(data.batches(45, shuffle=False, bucket=False)))
    padded = tokenizer.pad(wanted, return_tensors="pt")
    assert batch.input_ids.equal(padded["input_ids"])
    assert batch.attention_mask.equal(padded["attention_mask"].bool())
    if data.uses_token_types:
        assert batch.token_type_ids.equal(padded["token_type_ids"])
    else:
        assert not batch.token_type_ids.any()
    assert data.uses_token_types == ("token_type_ids" in tokenizer.model_input_names)
    assert data.pad_id == tokenizer.pad_token_id


def test_more_rows_than_one_block():
    texts = sentences(BLOCK + 7, high=3)
    data = encode_task(Rows((texts,), np.zeros(len(texts), np.int64)), SINGLE, bert_tokenizer(), 16)
    assert len(data) == BLOCK + 7
    assert data.row(BLOCK + 6).tolist() == bert_tokenizer()(texts[-1])["input_ids"]


def test_encoding_leaves_the_tokenizer_as_it_was():
    tokenizer = bert_tokenizer()
    encode_task(Rows((sentences(3, low=15),), np.zeros(3, np.int64)), SINGLE, tokenizer, 8)
    assert len(tokenizer("the cat " * 20)["input_ids"]) == 42


def test_python_tokenizers_work_too():
    """A tokenizer without a Rust object gives the same data set through its public call."""
    fast = bert_tokenizer()

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(fast, name)

        def __call__(self, *args, **kwargs):
            return fast(*args, **kwargs)

    columns = (sentences(20, seed=1), sentences(20, seed=2))
    a, b = (encode_task(Rows(columns, np.zeros(20, np.float32)), PAIR, t, 12) for t in (fast, Slow()))
    assert a.fingerprint() == b.fingerprint()
    assert a.truncated == b.truncated > 0
    texts = [" . ".join(sentences(9))]
    assert encode_text(texts, fast, 12).fingerprint() == encode_text(texts, Slow(), 12).fingerprint()


def test_max_length_above_the_models_positions_is_refused():
    tokenizer = bert_tokenizer(max_length=64)
    with pytest.raises(UserError, match=r"max_length is 65, above the tokenizer's limit of 64: choose at most 64"):
        check_max_length(65, tokenizer)
    with pytest.raises(UserError, match=r"max_length is 33, above the model's positions of 32"):
        encode_text(["a"], tokenizer, 33, max_positions=32)
    check_max_length(128, tokenizer, max_positions=128)
    with pytest.raises(UserError, match="needs 5 tokens"):
        check_max_length(4, tokenizer)
    unlimited = bert_tokenizer(max_length=int(1e30))
    check_max_length(100_000, unlimited)


def test_model_positions_leave_out_robertas_offset():
    assert model_positions(SimpleNamespace(model_type="bert", max_position_embeddings=512, pad_token_id=0)) == 512
    assert model_positions(SimpleNamespace(model_type="roberta", max_position_embeddings=514, pad_token_id=1)) == 512
    assert model_positions(SimpleNamespace(model_type="other")) is None


def test_tokenizer_without_padding_is_refused():
    tokenizer = bert_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        encode_text(["the cat"], tokenizer, 16)


# -- text ---------------------------------------------------------------------------------------------------------


def test_text_keeps_every_token_in_order_and_crosses_no_document(tokenizer):
    documents = [". ".join(sentences(n, seed=n, high=9)) + "." for n in (1, 2, 30, 3, 1)]
    data = encode_text(documents, tokenizer, 24)
    ends = tokenizer.cls_token_id, tokenizer.sep_token_id
    got = [data.row(i).tolist() for i in range(len(data))]
    assert all((row[0], row[-1]) == ends and 3 <= len(row) <= 24 for row in got)
    assert data.labels is None
    assert (data.second == data.lengths).all()
    position = 0
    for document in documents:
        wanted = tokenizer(document, add_special_tokens=False)["input_ids"]
        seen = []
        while len(seen) < len(wanted):
            seen += got[position][1:-1]
            position += 1
        assert seen == wanted
    assert position == len(got)


def test_text_packs_greedily():
    tokenizer = bert_tokenizer()
    document = "the cat sat . the dog ran . the bird flew ."  # sentences of 4 tokens
    assert encode_text([document], tokenizer, 10).lengths.tolist() == [10, 6]
    assert encode_text([document], tokenizer, 13).lengths.tolist() == [10, 6]
    assert encode_text([document], tokenizer, 14).lengths.tolist() == [14]
    assert encode_text([document] * 2, tokenizer, 64).lengths.tolist() == [14, 14]


def test_sentence_longer_than_a_sequence_is_cut_hard():
    data = encode_text(["the cat " * 25], bert_tokenizer(), 16)
    assert data.lengths.tolist() == [16, 16, 16, 10]


def test_empty_documents_leave_no_sequence():
    assert len(encode_text(["", "  \n ", "the"], bert_tokenizer(), 16)) == 1
    assert len(encode_text([], bert_tokenizer(), 16)) == 0


def test_sentences_end_at_marks_and_line_ends():
    text = 'He said "go now." Then he left!  Really? (Yes.) It is 3.5 m\nlong, e.g. here'
    wanted = ['He said "go now."', " Then he left!", " Really?", " (Yes.)", " It is 3.5 m", " long, e.g.", " here"]
    assert split_sentences(text) == wanted


# -- environment --------------------------------------------------------------------------------------------------


def test_forking_after_encoding_is_quiet():
    """Unset: no warning and no deadlock in the child (with parallelism left on, the child does hang)."""
    program = (
        "import os, sys; sys.path.insert(0, 'tests/engine')\n"
        "from data_toys import bert_tokenizer, sentences\n"
        "from engine.data import encode_text\n"
        "t = bert_tokenizer(); encode_text(sentences(50), t, 16)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    t(sentences(5)); os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "print(os.environ['TOKENIZERS_PARALLELISM'])\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "false"
    assert "parallelism" not in done.stderr.lower()


@pytest.mark.parametrize("given", ["true", "false"])
def test_the_users_choice_of_parallelism_stays(monkeypatch, given):
    monkeypatch.setattr(tokenizing, "_USER_CHOICE", given)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", given)
    encode_text(["the cat"], bert_tokenizer(), 16)
    assert os.environ["TOKENIZERS_PARALLELISM"] == given
