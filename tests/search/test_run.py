"""The command `python -m search.run`, end to end: results, reproducibility, resumption after a kill, wrong input.

The runs use a tiny random BERT as teacher and a generated task whose classes differ by the words in them, so that
nothing outside this folder is needed and a run takes seconds.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from latency_toys import RATIOS, toy_table

from engine.architecture.file import load_architecture
from search.evidence import read_predictions
from search.report.tables import read_candidates

REPO = Path(__file__).resolve().parents[2]
WORDS = {
    "bad": ["awful", "broken", "poor", "sad", "terrible", "worst", "hate", "useless"],
    "good": ["great", "lovely", "superb", "happy", "excellent", "best", "love", "useful"],
}
FILLER = [
    "the",
    "a",
    "phone",
    "film",
    "movie",
    "battery",
    "story",
    "was",
    "is",
    "and",
    "it",
    "very",
    "really",
    "quite",
    "today",
]


def write_task(path: Path, rows: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for _ in range(rows):
            label = rng.choice(sorted(WORDS))
            words = rng.choices(FILLER, k=rng.randint(3, 12)) + rng.choices(WORDS[label], k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.csv, dev.csv and teacher/ (random weights, its own vocabulary)."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("workspace")
    write_task(folder / "train.csv", 400, seed=1)
    write_task(folder / "dev.csv", 100, seed=2)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *WORDS["bad"], *WORDS["good"]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def options(workspace: Path, name: str) -> list[str]:
    return [
        *("--preset", "smoke", "--runs", str(workspace / "runs"), "--name", name),
        *("--precision", "fp32", "--teacher_precision", "fp32"),
        *("--teacher", str(workspace / "teacher"), "--student.hidden_size", "24", "--student.embedding_size", "16"),
        *("--data.train", str(workspace / "train.csv"), "--data.dev", str(workspace / "dev.csv")),
        *("--data.max_length", "24", "--data.min_held_out", "40", "--derive.task.steps", "40", "--threads", "1"),
    ]


WITHOUT_BASELINES = ("--baselines.gelu", "false", "--baselines.random", "false")
"""For runs that are interrupted or repeated: what the baselines add is more of the same phases."""


def command(workspace: Path, *arguments: str) -> tuple[list[str], dict[str, str]]:
    environment = {**os.environ, "FFNAS_CACHE": str(workspace / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return [sys.executable, "-m", "search.run", *arguments], environment


def run(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line, environment = command(workspace, *arguments)
    return subprocess.run(line, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def finished(workspace: Path) -> Path:
    """The run directory of one whole run, baselines included."""
    result = run(workspace, *options(workspace, "finished"))
    assert result.returncode == 0, result.stderr
    folder = workspace / "runs" / "finished"
    assert str(folder / "best" / "model") in result.stdout
    assert str(folder / "report.html") in result.stdout
    return folder


@pytest.fixture(scope="module")
def undisturbed(workspace: Path) -> Path:
    """The run directory of an undisturbed run without baselines."""
    result = run(workspace, *options(workspace, "undisturbed"), *WITHOUT_BASELINES)
    assert result.returncode == 0, result.stderr
    return workspace / "runs" / "undisturbed"


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def outcome(folder: Path) -> dict:
    """What must not depend on interruptions or on when the run happened."""
    values = summary(folder)
    return {key: values[key] for key in ("best", "baselines", "teacher", "trials", "task", "seed")}


def test_run_directory_is_complete(finished: Path):
    expected = [
        *("config.yaml", "study.db", "log.jsonl", "report.html", "summary.json"),
        *("best/architecture.json", "best/model/config.json", "best/model/model.safetensors"),
        *(f"stage{n}/{name}" for n in (1, 2, 3) for name in ("candidates.csv", "best.json")),
    ]
    missing = [name for name in expected if not (finished / name).is_file()]
    assert not missing
    assert not list((finished / "checkpoints").glob("*.pt")), "a finished phase left its inner checkpoint"
    values = summary(finished)
    assert values["trials"]["1"] == 3
    assert values["trials"]["2"] == 3
    assert values["trials"]["3"] == 4
    assert values["trials"]["random"] == 10
    assert values["score"] == {"name": "neg_log_loss", "split": "score"}
    for n in (1, 2, 3):
        scores = [t.score for t in read_candidates(finished / f"stage{n}" / "candidates.csv")]
        assert len(set(scores)) == len(scores), "likelihoods tell candidates apart"
        assert max(scores) == json.loads((finished / f"stage{n}" / "best.json").read_text())["score"] < 0
    low, high = values["budget"]["params"]
    assert low <= values["best"]["params"] <= high
    assert values["best"]["metric"]["split"] == "dev"


def test_reported_accuracy_is_that_of_the_exported_model(workspace: Path, finished: Path):
    """An independent script: transformers' own pipeline over the rows of dev.csv."""
    script = """
import csv, sys
import engine
from transformers import pipeline
rows = list(csv.DictReader(open(sys.argv[2])))
classify = pipeline("text-classification", model=sys.argv[1])
answers = classify([r["sentence"] for r in rows])
print(sum(a["label"] == r["label"] for a, r in zip(answers, rows)) / len(rows))
"""
    model, dev = str(finished / "best" / "model"), str(workspace / "dev.csv")
    result = subprocess.run(
        [sys.executable, "-c", script, model, dev], cwd=REPO, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    accuracy = float(result.stdout.split()[-1])
    assert accuracy == pytest.approx(summary(finished)["best"]["metrics"]["dev"]["accuracy"], abs=1e-9)


def test_evidence_compares_with_every_model_and_stands_in_the_model_card(finished: Path):
    values = summary(finished)
    evidence = values["evidence"]
    models = {m["name"]: m for m in evidence["models"]}
    assert set(models) == {"found", "gelu", "random", "teacher", "bag_of_words", "majority"}
    assert models["found"]["metric"]["value"] == values["best"]["metric"]["value"]
    assert models["teacher"]["metric"]["value"] == values["teacher"]["metric"]["value"]
    for name in ("gelu", "random"):
        assert models[name]["metric"]["value"] == values["baselines"][name]["metric"]["value"]
    for name in models:
        rows, labels = read_predictions(finished, name)
        assert rows.shape == (100, 2)
        assert (rows.argmax(axis=1) == labels).mean() == pytest.approx(models[name]["metric"]["value"])
    assert models["bag_of_words"]["metric"]["value"] > 0.9, "its words tell the class"
    weights = finished / "best" / "model" / "model.safetensors"
    assert models["found"]["bytes"] == weights.stat().st_size
    assert {entry["batch"] for entry in models["teacher"]["speed"]} == {1, 32}
    assert "evidence" in values["seconds"]
    card = (finished / "best" / "model" / "README.md").read_text()
    assert "## How it compares" in card
    assert evidence["verdict"].removeprefix("found:") in card
    assert "Is it worth shipping?" in (finished / "report.html").read_text()


def test_parameters_are_those_of_the_exported_model(finished: Path):
    from safetensors import safe_open

    with safe_open(finished / "best" / "model" / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    heads = sum(size for name, size in sizes.items() if ("classifier" in name or "cls_pooler" in name))
    assert sum(sizes.values()) - heads == summary(finished)["best"]["params_without_fit_dense"]


def test_same_seed_gives_the_same_result(finished: Path, undisturbed: Path):
    """Two runs in two processes; the second without baselines, which must change nothing else."""
    first, second = outcome(finished), outcome(undisturbed)
    for key in ("best", "teacher", "task", "seed"):
        assert first[key] == second[key]
    for stage in "123":
        assert first["trials"][stage] == second["trials"][stage]


def kill_when(workspace: Path, name: str, reached: str) -> bool:
    """Starts a run and kills it as soon as the path `reached` exists in its directory; whether it was killed."""
    line, environment = command(workspace, *options(workspace, name), *WITHOUT_BASELINES)
    process = subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    target = workspace / "runs" / name / reached
    deadline = time.monotonic() + 200
    while not target.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "reached",
    [
        "study.db",
        pytest.param("stage1/best.json", marks=pytest.mark.slow),
        pytest.param("stage2/best.json", marks=pytest.mark.slow),
        pytest.param("stage3/best.json", marks=pytest.mark.slow),
        "checkpoints/derive/text.safetensors",
    ],
    ids=["stage 1", "stage 2", "stage 3", "derive", "derive task"],
)
def test_killed_run_resumes_to_the_same_end(workspace: Path, undisturbed: Path, reached: str):
    name = "killed-" + reached.replace("/", "-")
    assert kill_when(workspace, name, reached), "the run ended before it could be killed"
    folder = workspace / "runs" / name
    result = run(workspace, "--resume", str(folder))
    assert result.returncode == 0, result.stderr
    assert outcome(folder) == outcome(undisturbed)


def test_terminated_run_exits_143_and_resumes(workspace: Path, undisturbed: Path):
    line, environment = command(workspace, *options(workspace, "terminated"), *WITHOUT_BASELINES)
    process = subprocess.Popen(line, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    target = workspace / "runs" / "terminated" / "stage1" / "supernet.safetensors"
    while not target.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in errors.decode()
    result = run(workspace, "--resume", str(workspace / "runs" / "terminated"))
    assert result.returncode == 0, result.stderr
    assert outcome(workspace / "runs" / "terminated") == outcome(undisturbed)


WRONG = {
    "unknown column": (["--data.label_column", "stars"], "stars"),
    "teacher not found": (["--teacher", "no/such-teacher"], "no/such-teacher"),
    "width policy": (["--space.policy", "wrap"], "wrap"),
    "budget nothing fits": (["--budget.params", "1e9", "2e9"], "budget.params"),
    "heads do not divide": (["--student.hidden_size", "25"], "25"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "unknown option": (["--student.depth", "3"], "depth"),
    "wrong type": (["--stage1.trials", "many"], "many"),
    "unknown sampler": (["--sampler.name", "magic"], "magic"),
    "missing file": (["--data.train", "nowhere.csv"], "nowhere.csv"),
    "text too long": (["--data.max_length", "100"], "100"),
    "too many student layers": (["--student.num_layers", "7"], "7"),
    "ratio": (["--space.ratios", "[3/2]"], "3/2"),
    "no such run": (["--resume", "runs/none"], "runs/none"),
}


@pytest.fixture
def refused(workspace: Path, capsys, monkeypatch):
    """Runs the command in this process; gives the one line it ended with."""
    monkeypatch.setenv("FFNAS_CACHE", str(workspace / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*arguments: str) -> str:
        from search.cli import main

        capsys.readouterr()
        assert main(["search", *arguments]) == 2
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1, message
        assert message.startswith("ffnas: error: ")
        return message

    return call


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line(workspace: Path, refused, case: str):
    arguments, mentioned = WRONG[case]
    name = "wrong-" + case.replace(" ", "-")
    base = [] if case == "no such run" else options(workspace, name)
    assert mentioned in refused(*base, *arguments)
    assert not (workspace / "runs" / name).exists()


def test_wrong_input_ends_the_process_with_exit_code_2(workspace: Path):
    result = run(workspace, *options(workspace, "wrong"), "--data.label_column", "stars")
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "stars" in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


@pytest.mark.parametrize("content", ["", "sentence,label\n"], ids=["empty", "header only"])
def test_empty_file_ends_in_one_line(workspace: Path, tmp_path: Path, refused, content: str):
    (tmp_path / "empty.csv").write_text(content)
    assert "empty.csv" in refused(*options(workspace, "empty"), "--data.train", str(tmp_path / "empty.csv"))


def test_dev_without_labels_ends_in_one_line(workspace: Path, tmp_path: Path, refused):
    (tmp_path / "dev.csv").write_text("sentence\nthe phone\n")
    assert "label" in refused(*options(workspace, "unlabelled"), "--data.dev", str(tmp_path / "dev.csv"))


def test_used_run_directory_is_not_overwritten(workspace: Path, finished: Path, refused):
    before = (finished / "summary.json").read_bytes()
    assert "--resume" in refused(*options(workspace, "finished"))
    assert (finished / "summary.json").read_bytes() == before


def test_help_teaches(capsys):
    from search.cli import main

    assert main(["search", "--help"]) == 0
    printed = capsys.readouterr().out
    for word in ("--data.train", "--budget.encoder", "--resume", "--help-all"):
        assert word in printed


def resolved(folder: Path, name: str) -> tuple[dict, Path]:
    return json.loads((folder / "resolved" / name / "summary.json").read_text()), folder / "resolved" / name


def test_resolve_answers_under_another_budget_without_training(workspace: Path, finished: Path, monkeypatch):
    """The answer keeps the budget, is the supernet's slice, and leaves the run as it was."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from engine.architecture.architecture import Architecture
    from engine.architecture.flops import count_flops
    from engine.student.supernet import build_student
    from engine.training.checkpoint import load_weights
    from search.cli import main
    from search.report.tables import read_candidates

    monkeypatch.setenv("FFNAS_CACHE", str(workspace / "cache"))
    trials = read_candidates(finished / "stage3" / "candidates.csv")
    limit = sorted(t.costs["flops"] for t in trials)[0] * 1.02
    before = {name: (finished / name).read_bytes() for name in ("summary.json", "stage3/candidates.csv", "config.yaml")}
    assert main(["search", "--resolve", str(finished), "--budget.flops", str(limit)]) == 0
    found, folder = resolved(finished, f"flops-{limit:.12g}")
    exported = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    shape = exported.config.shape
    arch = load_architecture(folder / "architecture.json")
    assert count_flops(arch, shape, 24) == found["costs"]["flops"] <= limit
    assert {layer.expression for layer in arch.layers} == {
        layer.expression for layer in Architecture.parse(trials[0].architecture).layers
    }
    within = [t.score for t in trials if t.costs["flops"] <= limit and t.state == "complete"]
    assert found["score"] >= max(within)
    whole = Architecture(tuple(type(v)(v.expression, 4, max(RATIOS)) for v in arch.layers))
    sizes = type(shape)(**{**{n: getattr(shape, n) for n in shape.__slots__}, "teacher_hidden_size": 32})
    supernet = build_student(sizes, whole, exported.config.num_attention_heads, num_labels=2).eval()
    load_weights(finished / "stage3" / "supernet.safetensors", supernet)
    ids = torch.randint(5, 30, (3, 9))
    with torch.no_grad():  # same weights, views here and copies there: only the order of sums may differ
        torch.testing.assert_close(exported(ids).logits, supernet(ids, architecture=arch).logits, rtol=1e-5, atol=1e-5)
    assert before == {name: (finished / name).read_bytes() for name in before}


def test_resolve_by_latency_uses_a_table_and_measures(workspace: Path, finished: Path, tmp_path: Path, refused):
    from engine.student import FFNASConfig
    from search.cli import main

    config = FFNASConfig.from_pretrained(finished / "best" / "model")
    toy = toy_table(config.shape, config.num_attention_heads, sequence_length=24)
    toy.save(tmp_path / "table.json")
    given = ["--resolve", str(finished), "--objectives.latency_table", str(tmp_path / "table.json")]
    assert main(["search", *given, "--budget.latency-ms", "900"]) == 0
    found, _ = resolved(finished, "latency_ms-900")
    assert found["latency"]["predicted_ms"] < 900
    assert 0 < found["latency"]["measured_ms"] < 900
    assert found["latency"]["correction"] == 1.0
    assert found["latency"]["table"]["mean_error"] == pytest.approx(0.02 / 3 / 0.99)  # 0, 1 and 1 % too slow
    assert "budget.latency_ms" in refused(*given, "--budget.latency-ms", "0.01")
    # made-up costs of a microsecond: what is exported takes longer, and nothing is as fast once that is known
    toy.scaled(1e-4).save(tmp_path / "table.json")
    assert "budget" in refused(*given, "--budget.latency-ms", "0.01", "--objectives.unfit_table", "true")
    assert "not checked, so unfit" in refused(*given, "--budget.latency-ms", "0.01")
    assert sorted(p.name for p in (finished / "resolved").iterdir() if p.name.startswith("latency")) == [
        "latency_ms-900"
    ]


WRONG_RESOLVE = {
    "no run": (("--resolve", "runs/none", "--budget.flops", "1e9"), "config.yaml"),
    "no budget": (("--resolve", "FINISHED"), "at least one constraint"),
    "other option": (("--resolve", "FINISHED", "--budget.flops", "1e9", "--seed", "1"), "--seed"),
    "impossible": (("--resolve", "FINISHED", "--budget.flops", "1000"), "the least found is"),
    "no table": (
        ("--resolve", "FINISHED", "--budget.latency_ms", "9", "--objectives.latency_table", "none.json"),
        "none.json",
    ),
}


@pytest.mark.parametrize("case", WRONG_RESOLVE)
def test_wrong_resolve_ends_in_one_line(finished: Path, refused, case: str):
    arguments, mentioned = WRONG_RESOLVE[case]
    assert mentioned in refused(*(str(finished) if a == "FINISHED" else a for a in arguments))


def test_resolve_refuses_an_unfinished_run(finished: Path, tmp_path: Path, refused):
    (tmp_path / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
    assert "has not finished" in refused("--resolve", str(tmp_path), "--budget.flops", "1e9")
