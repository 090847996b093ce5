"""Sentences of words to tokens: first pieces are labelled, long sentences become windows, no word is lost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import BertTokenizerFast

from engine.data import TaskSpec
from engine.data.encode_tags import encode_tags, windows_of
from engine.data.rows import NO_LABEL, Rows
from engine.data.tags import UNTAGGED, Tags, bio_names
from engine.errors import UserError

SPEC = TaskSpec("t", "tokens", ("words",), "tags", bio_names(["A"]), "f1")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##b", "##c", "."]
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(vocabulary) + "\n")
    return BertTokenizerFast(vocab=str(path))


def test_labels_stand_at_the_first_piece_of_every_word(tokenizer):
    rows = Rows((["a abb a.b \u200b b"],), golds=[Tags((1, 2, 0, 0, UNTAGGED))])
    data = encode_tags(rows, tokenizer, 32)
    words = tokenizer.convert_ids_to_tokens(data.row(0).tolist())
    assert words == ["[CLS]", "a", "a", "##b", "##b", "a", ".", "b", "[UNK]", "b", "[SEP]"]
    assert data.labels.tolist() == [-100, 1, 2, -100, -100, 0, -100, -100, 0, UNTAGGED, -100]
    assert data.spans.start.tolist() == [-1, 0, 1, -1, -1, 2, -1, -1, 3, 4, -1]
    batch = data.collate([0])
    assert torch.equal(SPEC.head.places(batch)[0], batch.labels[0] != NO_LABEL)


def test_rows_without_tags_say_where_words_are(tokenizer):
    data = encode_tags(Rows((["a ab", "b"],)), tokenizer, 32)
    assert data.labels.tolist() == [-100, UNTAGGED, UNTAGGED, -100, -100, -100, UNTAGGED, -100]


@pytest.mark.parametrize("seed", range(30))
def test_windows_hold_every_word_once_in_their_room(seed):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 5, generator.integers(1, 60)).tolist()
    room, overlap = int(generator.integers(5, 20)), int(generator.integers(0, 5))
    windows = windows_of(sizes, room, overlap)
    assert [k for _, _, (a, b) in windows for k in range(a, b)] == list(range(len(sizes)))
    for first, last, (a, b) in windows:
        assert first <= a <= b <= last
        assert sum(sizes[first:last]) <= room
    shared = [sum(sizes[b:a]) for (_, a, _), (b, _, _) in itertools.pairwise(windows)]
    assert all(0 <= s <= overlap for s in shared)


def test_answers_of_windows_are_put_together_again(tokenizer):
    texts = [" ".join(["a", "b", "abb"] * n) for n in (1, 9, 2, 14)]
    golds = [Tags(tuple(k % 3 for k in range(text.count(" ") + 1))) for text in texts]
    data = encode_tags(Rows((texts,), golds=golds), tokenizer, 12, 3)
    assert len(data) > len(texts)
    assert data.truncated == 2
    head, found = SPEC.head, []
    order = np.random.default_rng(0).permutation(len(data))
    for rows in np.array_split(order, 5):  # a model that is right everywhere
        labels = data.collate(rows).labels
        found.append((rows, torch.nn.functional.one_hot(labels.clamp(min=0), SPEC.num_labels).float()))
    answers = head.answer(SPEC, data, found)
    assert [tags.tolist() for tags in answers.tags] == [list(gold.ids) for gold in golds]
    measured = head.score(SPEC, answers, head.gold_of(data))
    assert measured.metrics["f1"] == measured.metrics["accuracy"] == 1.0
    assert measured.rows()[:, 1].tolist() == [len(gold.ids) for gold in golds]
    counts = np.array([[1, 0, 2, 1], [0, 1, 0, 0]])
    assert head.resampled(SPEC, measured.rows(), None, counts).tolist() == [1.0, 1.0]
    scores, places = head.outputs(data, found)
    assert places.sum(1).tolist() == [len(gold.ids) for gold in golds]
    assert head.rows_apart((scores, places), (scores, places)).abs().max() < 1e-6
    for tags, own, here in zip(golds, scores, places, strict=True):
        assert own[here].argmax(-1).tolist() == list(tags.ids)


def test_a_stride_without_room_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data.stride is 10: with data.max_length 12 choose at most 9"):
        encode_tags(Rows((["a"],)), tokenizer, 12, 10)


def test_diverged_scores_are_told(tokenizer):
    data = encode_tags(Rows((["a b"],)), tokenizer, 12)
    with pytest.raises(FloatingPointError, match="diverged"):
        SPEC.head.answer(SPEC, data, [(np.array([0]), torch.full((1, 4, 3), torch.nan))])
