"""What `evaluate_dev` keeps: a row per row of dev in its order, and the metrics are those of the rows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from engine.data import EncodedDataset, EncodedTask, TaskSpec
from engine.data.rows import Gold
from engine.evaluation.answers import Answer, answer_metrics, answer_scores
from engine.evaluation.evaluation import evaluate, evaluate_dev


class Sums(nn.Module):
    """Logits from the sum of a row's token ids, so that each row has its own."""

    def __init__(self, classes):
        super().__init__()
        self.scale = nn.Parameter(torch.arange(1.0, classes + 1))

    def forward(self, input_ids, attention_mask, token_type_ids, return_dict):
        total = (input_ids * attention_mask).sum(dim=-1, keepdim=True)
        logits = torch.cos(total * self.scale) if input_ids.ndim == 2 else torch.cos(total.squeeze(-1))
        return Output(logits=logits)


class Output(SimpleNamespace):
    def __contains__(self, name):
        return hasattr(self, name)


def data(count, choices=1, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, count * choices)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(1, 90, offsets[-1]).astype(np.int32)
    labels = rng.integers(0, classes, count)
    return EncodedDataset(tokens, offsets, lengths.astype(np.int32), labels, choices=choices)


@pytest.mark.parametrize("choices", [1, 3])
def test_rows_are_in_the_order_of_dev(choices):
    dev = data(301, choices)
    names = ("a", "b", "c")
    if choices == 1:
        spec = TaskSpec("toy", "classification", ("text",), "label", names)
    else:
        spec = TaskSpec("toy", "multiple_choice", ("text", *names), "label", names)
    kept = []
    model = Sums(3)
    metrics = evaluate_dev(model, EncodedTask(spec, dev, dev, dev, dev, dev), keep=kept.append)
    assert metrics == evaluate(model, dev, spec) == evaluate_dev(model, EncodedTask(spec, dev, dev, dev, dev, dev))
    (rows,) = kept
    assert rows.dtype == np.float32
    totals = np.add.reduceat(dev.tokens.astype(np.float64), dev.offsets[:-1])
    expected = np.cos(totals.reshape(-1, 3) if choices > 1 else totals[:, None] * [1, 2, 3])
    np.testing.assert_allclose(rows, expected, atol=1e-4)
    assert (rows.argmax(axis=1) == dev.labels).mean() == pytest.approx(metrics["accuracy"])


@pytest.mark.parametrize("no_answer", [False, True])
def test_scores_of_questions_average_to_the_official_ones(no_answer):
    texts = ["the red house", "a dog", "", "blue", "ten"]
    golds = [
        Gold(("red house",), (4,)),
        Gold(("dog bone",), (0,)),
        Gold(),
        Gold(("green",), (0,)),
        Gold(("ten",), (1,)),
    ]
    found = [Answer(t, 1.0, 3.0 if i == 4 else 0.0, ()) for i, t in enumerate(texts)]
    scores = answer_scores(found, golds, no_answer=no_answer, threshold=0.5)
    assert scores.shape == (5, 2)
    official = answer_metrics(found, golds, no_answer=no_answer, threshold=0.5)
    assert scores[:, 0].mean() == pytest.approx(official["exact_match"])
    assert scores[:, 1].mean() == pytest.approx(official["f1"])
    assert scores[4, 0] == (0 if no_answer else 1)
