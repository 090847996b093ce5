"""The command on real tasks, a few hundred rows each: the right columns, kind and metric, end to end.

The rows come from the folder `../shared/data` beside the repository, which is not part of it.
"""

import csv
import json
from pathlib import Path

import pytest

from search.cli import main

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"real task data are not at {DATA}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with random weights and a vocabulary of letters and frequent words."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("teacher")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'\"!?-$%&;:()"
    words = ["the", "of", "and", "to", "a", "in", "is", "that", "it", "not", "good", "bad", "film", "man"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *words[:-1]]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("task", "kind", "metric", "others"),
    [
        ("sst2", "classification", "accuracy", {"f1", "mcc"}),
        ("cola", "classification", "mcc", {"accuracy"}),
        ("mrpc", "classification", "f1", {"accuracy"}),
        ("stsb", "regression", "pearson", {"spearman"}),
    ],
)
def test_task_runs_and_reports_its_metric_over_the_whole_split(
    task, kind, metric, others, teacher, tmp_path, monkeypatch
):
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
    code = main(
        [
            *("search", "--preset", "smoke", "--runs", str(tmp_path), "--name", "run", "--teacher", str(teacher)),
            *("--data.train", str(DATA / task / "train.csv"), "--data.dev", str(DATA / task / "dev.csv")),
            *("--data.max_length", "60", "--data.max_train", "300", "--data.max_dev", "100000"),
            *("--student.hidden_size", "12", "--student.embedding_size", "8"),
            *("--baselines.gelu", "false", "--baselines.random", "false"),
            *("--precision", "fp32", "--teacher_precision", "fp32"),
        ]
    )
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task"]["kind"] == kind
    assert summary["best"]["metric"]["name"] == metric
    assert others <= set(summary["best"]["metrics"]["dev"])
    with (DATA / task / "dev.csv").open(newline="") as file:
        assert summary["task"]["rows"]["dev"] == sum(1 for _ in csv.DictReader(file))
