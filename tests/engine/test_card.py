"""Model cards: what the hub reads from their head, and that no text of somebody's data becomes more than text."""

from __future__ import annotations

import subprocess
import sys

import pytest
from encoder_reference import TRUNCATE, architecture, randomize, small_config
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from plain_subprocess import run_plain
from transformers import BertTokenizer

from engine.export.card import model_card
from engine.export.export import export_model
from engine.export.markdown import code, plain, table
from engine.student import FFNASForMultipleChoice, FFNASForQuestionAnswering, FFNASForSequenceClassification

NASTY = [
    "<script>alert(1)</script>",
    "a|b || c",
    "`code` ```fence``` ``",
    "line\nline\r\n\ttab\x00\x1b[31m",
    "# heading",
    "- item",
    "1. first",
    "[link](http://x.y) ![image](http://x.y/z.png)",
    "**bold** _it_ ~~gone~~ $x_1$",
    "&lt;b&gt; &amp; \\| \\",
    "---",
    "=== ",
    "> quote",
    "\u202etxet desrever",
]


def rendered(text: str) -> str:
    """HTML that a Markdown renderer which lets HTML through makes of it."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("place", ["{}\n", "- {}\n", "# {}\n", "| a | b |\n| --- | --- |\n| {} | c |\n"])
def test_a_text_stays_the_text_it_is(text, place):
    """Wherever it stands the page has the elements it has with a plain word, and shows the text."""
    import html
    import re

    made, usual = rendered(place.format(plain(text))), rendered(place.format("word"))
    assert re.findall(r"<[^>]*>", made) == re.findall(r"<[^>]*>", usual)
    shown = html.unescape(re.sub(r"<[^>]*>", "", made))
    visible = " ".join(re.sub("[\x00-\x1f\u202e]", " ", text).split())
    assert visible in " ".join(shown.split())


def test_code_stays_one_block():
    command = "ffnas --config '/a ``` b' <c> `d`\n```"
    assert rendered(code(command)).count("<pre>") == 1
    assert "&lt;c&gt;" in rendered(code(command))


def test_tables_have_a_cell_for_every_name():
    lines = table(["a", "b"], [[plain("x|y"), plain("|")], ["1", "2"]])
    assert rendered("\n".join(lines)).count("<td>") == 4


SPLIT = {"name": "accuracy", "low": 0.7, "high": 0.9}
EVIDENCE = {
    "verdict": "found: accuracy 0.800 on dev (10 rows): level with a|b <i>.",
    "advice": ["try\nmore"],
    "split": "dev",
    "rows": 10,
    "confidence": 0.95,
    "speed": {"processor": "Some <CPU> | 9000", "threads": 1, "device": "cpu", "precision": "fp32"},
    "models": [
        {
            "name": name,
            "title": title,
            "kind": kind,
            "metric": {**SPLIT, "value": value},
            "difference": None if kind == "found" else {"value": 0.1, "low": -0.1, "high": 0.3},
            "params": {"encoder": 1000, "total": 2000},
            "bytes": 4_200_000 if kind == "found" else None,
            "speed": [{"side": "eager", "batch": batch, "length": 64, "milliseconds": ms * batch} for batch in (1, 32)],
        }
        for name, title, kind, value, ms in (
            ("found", "found", "found", 0.8, 2.0),
            ("teacher", "its <teacher>", "teacher", 0.7, 10.0),
        )
    ],
    "answers": {
        "classes": [
            {"label": label, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 4} for label in NASTY[:3]
        ],
        "confusion": None,
        "samples": {
            kind: [{"texts": [text], "gold": NASTY[0], "answer": NASTY[1], "probability": 0.91} for text in NASTY]
            for kind in ("right", "wrong")
        },
    },
}
CARD = {
    "name": "A `teacher` at a quarter: <b>, for a|b",
    "about": "About\nit <hr>.",
    "task": "x",
    "teacher": "org/teacher",
    "base_model": "org/teacher",
    "language": "en",
    "dataset": {"name": "my | reviews: é", "hub": None},
    "metric": {"name": "mcc", "value": 0.5, "split": "dev"},
    "metrics": {"accuracy": 0.8, "mcc": 0.5},
    "trained_on": ["classes: <script>x</script> 3"],
    "limits": ["none `known`"],
    "examples": ('One "text".',),
    "commands": {"To distil it": "ffnas search --name `x`"},
    "evidence": EVIDENCE,
}


@pytest.fixture(scope="module")
def model():
    config = small_config(layers=architecture([(TRUNCATE[0], 1, 1)] * 3), id2label=dict(enumerate("abc")))
    return randomize(FFNASForSequenceClassification(config)).eval()


def test_the_head_is_what_the_hub_reads(model):
    card = ModelCard(model_card(model, CARD))
    data = card.data
    assert (data.language, data.license, data.base_model) == ("en", None, "org/teacher")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    found = {(r.metric_type, r.metric_value, r.metric_name) for r in data.eval_results}
    assert found == {("matthews_correlation", 0.5, "mcc"), ("accuracy", 0.8, "accuracy")}
    first = data.eval_results[0]
    assert (first.task_type, first.dataset_name, first.dataset_split) == (
        "text-classification",
        "my | reviews: é",
        "dev",
    )
    assert first.dataset_type == "my-reviews"
    assert data.model_name == CARD["name"]
    assert "license" not in data.to_dict()


def test_a_known_license_and_data_set_are_named(model):
    data = ModelCard(model_card(model, {**CARD, "license": "mit", "dataset": {"name": "imdb", "hub": "org/imdb"}})).data
    assert (data.license, data.datasets, data.eval_results[0].dataset_type) == ("mit", ["org/imdb"], "org/imdb")
    assert ModelCard(model_card(model, {})).data.eval_results is None


def test_the_card_tells_everything_and_nothing_gets_out_of_its_cell(model):
    body = ModelCard(model_card(model, CARD)).text
    page = rendered(body)
    for tag in ("<script", "<hr", "<i>", "<b>", "<img", "<a ", "<teacher", "<cpu", "<blockquote"):
        assert tag not in page.lower(), tag
    headings = [line.removeprefix("## ") for line in body.splitlines() if line.startswith("## ")]
    assert headings == [
        *("How it compares", "Size and speed", "How to load it", "What it was trained on", "Class by class"),
        *("Sample answers", "Limits", "Architecture", "How it was found"),
    ]
    assert page.count("<h1>") == 1
    assert "0.8000 (0.7000 to 0.9000)" in body
    assert "Other scores on dev: accuracy 0.8000." in body
    assert "4.2 MB on disk." in body
    assert "| times as fast | 5.0 | 5.0 |" in body
    assert "0.500 | 0.250 | 0.333 | 4 |" in body
    assert body.count("(0.91)") == 2 * len(NASTY)
    for rows in page.split("<table>")[1:]:
        lines = rows.split("</table>")[0].split("<tr>")[1:]
        assert len({line.count("<td>") + line.count("<th>") for line in lines}) == 1


def test_of_many_classes_the_worst_are_shown(model):
    classes = [
        {"label": f"class{k}", "precision": 0.5, "recall": 0.5, "f1": k / 100, "support": 1}
        for k in reversed(range(60))
    ]
    text = model_card(model, {**CARD, "evidence": {**EVIDENCE, "answers": {"classes": classes, "samples": None}}})
    shown = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| class") and "0.5" in line]
    assert shown == [f"class{k}" for k in reversed(range(30))]
    assert "The 30 of 60 classes with the lowest F1." in text
    assert "Sample answers" not in text


def test_largest_errors_and_agreement_of_numbers(model):
    answers = {
        "values": {"pearson": 0.91234, "mean absolute error": 0.5},
        "largest_errors": [{"texts": ["a|b", "c"], "gold": 4.5, "answer": 1.25}],
    }
    text = model_card(model, {**CARD, "evidence": {**EVIDENCE, "answers": answers}})
    assert "| pearson | 0.9123 |" in text
    assert "| a\\|b | c | 4.5 | 1.25 |" in text
    assert "Class by class" not in text


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "text", "."]


def snippets(folder) -> list[str]:
    text = (folder / "README.md").read_text()
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    return [block.replace("path/to/this/folder", str(folder)) for block in blocks]


def test_snippets_run_without_ffnas_and_with_it(tmp_path):
    """Those of all kinds of models, one process without ffnas and one with it."""
    heads = {
        "text": FFNASForSequenceClassification,
        "pair": FFNASForSequenceClassification,
        "choice": FFNASForMultipleChoice,
        "question": FFNASForQuestionAnswering,
    }
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    for kind, head in heads.items():
        model = randomize(head(small_config(layers=architecture([(TRUNCATE[0], 1, 1)] * 3)))).eval()
        examples = ("One text.",) if kind == "text" else ("One text.", "Two text.")
        export_model(model, tokenizer, tmp_path / kind, None, {"examples": examples})
    without, with_ours = zip(*(snippets(tmp_path / kind) for kind in heads), strict=True)
    assert "engine" not in "".join(without)
    assert "trust_remote_code" not in "".join(with_ours)
    assert run_plain("\n".join([*without, "print('\"ran\"')"]), tmp_path) == "ran"
    done = subprocess.run([sys.executable, "-c", "\n".join(with_ours)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'label'") == 2
