"""Texts without labels in strategy inherit: joined to the training rows, counted by the teacher's answers alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import Nursery, make_inputs, options

from engine.data import EncodedDataset, TaskSpec
from engine.data.rows import NO_LABEL
from engine.data.task import head_of
from engine.distill.inherited import InheritedDistiller, InheritWeights
from search.inherit.texts import joined


def rows_of(texts: list[list[int]], labels: np.ndarray | None) -> EncodedDataset:
    lengths = [len(t) for t in texts]
    return EncodedDataset(
        tokens=np.concatenate(texts).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        second=np.array(lengths, dtype=np.int32),
        labels=labels,
    )


@pytest.mark.parametrize(
    ("kind", "labels", "nothing"),
    [("classification", np.array([1, 0]), -100), ("regression", np.array([0.5, 2], np.float32), np.nan)],
)
def test_joined_rows_are_those_of_both(kind, labels, nothing):
    head = head_of(kind)
    both = joined(rows_of([[5, 6, 7], [8]], labels), rows_of([[9, 10], [11, 12, 13, 14]], None), head)
    whole = both.collate(range(4))
    expected = [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0], [11, 12, 13, 14]]
    assert whole.input_ids.tolist() == expected
    assert whole.attention_mask.tolist() == [[t > 0 for t in row] for row in expected]
    np.testing.assert_array_equal(whole.labels.numpy(), np.array([*labels, nothing, nothing], dtype=labels.dtype))


def distiller(spec: TaskSpec) -> InheritedDistiller:
    made = InheritedDistiller.__new__(InheritedDistiller)
    made.spec, made.terms = spec, InheritWeights()
    return made


def spec_of(kind: str) -> TaskSpec:
    names = ("a", "b", "c") if kind == "classification" else ()
    return TaskSpec("toy", kind, ("text",), "label", names, "accuracy" if names else "spearman")


def test_rows_without_a_class_do_not_count_among_labels():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([2, NO_LABEL, 0, NO_LABEL, 1])
    made = distiller(spec_of("classification"))
    value = made.spec.head.gold_loss(logits, labels)
    torch.testing.assert_close(value, F.cross_entropy(logits[[0, 2, 4]], labels[[0, 2, 4]]))
    (gradient,) = torch.autograd.grad(value, logits)
    assert gradient[[1, 3]].abs().max() == 0
    assert made.spec.head.gold_loss(logits, torch.full((5,), NO_LABEL)).item() == 0


def test_rows_without_a_value_do_not_count_among_values():
    answers = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = torch.tensor([0.5, float("nan"), -1.0, float("nan")])
    made = distiller(spec_of("regression"))
    value = made.spec.head.gold_loss(answers, values)
    torch.testing.assert_close(value, F.mse_loss(answers[[0, 2], 0], values[[0, 2]]))
    (gradient,) = torch.autograd.grad(value, answers)
    assert gradient.isfinite().all()
    assert gradient[[1, 3]].abs().max() == 0
    assert made.spec.head.gold_loss(answers, torch.full((4,), float("nan"))).item() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("texts")
    make_inputs(made)
    (made / "more.txt").write_text("".join(f"the film number {i} was long\n" for i in range(300)))
    pairs = "".join(f"text {i},other {i},{i % 2}\n" for i in range(240))
    (made / "pairs.csv").write_text("sentence1,sentence2,label\n" + pairs)
    return made


def search(folder: Path, name: str, *more: str) -> list[str]:
    given = {"strategy": "inherit", "inherit.round_steps": 4, "inherit.candidates": 2, "inherit.uniform": 1}
    given |= {"inherit.random": 1, "inherit.rungs": 1, "inherit.calibration_tokens": 200, "inherit.score_tokens": 100}
    given |= {"inherit.ratios": "[1,1/2]", "inherit.heads": "[1]", "budget.encoder": 0.5, "data.max_text": 250}
    return [*options(folder, folder / "runs", name), *(w for k, v in given.items() for w in (f"--{k}", str(v))), *more]


def test_students_see_texts_without_labels(folder):
    """A pass has more batches with them: three passes over 240 - 60 + 250 rows instead of 180, 4 rows a batch."""
    with Nursery() as nursery:
        rule = ("--inherit.steps", "null", "--inherit.batch_size", "1")
        ended = nursery.run(search(folder, "with", *rule, "--data.text", str(folder / "more.txt")), folder / "cache")
        assert ended.code == 0, ended.err
        lines = [json.loads(line) for line in (folder / "runs" / "with" / "log.jsonl").read_text().splitlines()]
        steps = max(line["step"] for line in lines if line["phase"] == "search task")
        assert steps == 900  # of 3 * 430, capped; 180 rows alone would give 540
        again = nursery.run(["--resolve", str(folder / "runs" / "with"), "--budget.encoder", "0.4"], folder / "cache")
        assert again.code == 0, again.err
        pairs = [
            "--data.train",
            str(folder / "pairs.csv"),
            "--data.dev",
            "null",
            "--data.text",
            str(folder / "more.txt"),
        ]
        refused = nursery.run(search(folder, "pairs", *pairs), folder / "cache")
        assert refused.code == 2
        assert "data.text is not used: strategy inherit takes texts without labels for tasks of single texts" in (
            refused.err
        )
        assert not (folder / "runs" / "pairs").exists()
