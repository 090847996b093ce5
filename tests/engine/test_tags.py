"""Tag schemes, files of tags and entity F1, against seqeval where it is installed and against the definition."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from engine.data.read_tags import holds_tags, read_sentences
from engine.data.tags import as_bio, bio_names, entities_of, scheme_of, written
from engine.errors import UserError
from engine.evaluation.entities import counts_of, metrics_of, table_of, types_of

TYPES = ("LOC", "PER", "ORG")


def random_tags(generator, prefixes, count):
    tags = [f"{p}-{t}" for p in prefixes for t in TYPES]
    return [generator.choice([*tags, "O", "O"]) for _ in range(count)]


def conlleval_entities(tags):
    """The published script's rules for BIO and IOB1, as one reads them: type and ends, by scanning."""
    spans, start = [], None
    padded = [("O", ""), *(tuple(t.split("-")) if t != "O" else ("O", "") for t in tags), ("O", "")]
    for k in range(1, len(padded)):
        (before, of), (now, kind) = padded[k - 1], padded[k]
        inside = now == "I" and before != "O" and kind == of
        if start is not None and not inside:
            spans.append((of, start, k - 1))
            start = None
        if now != "O" and start is None:
            start = k - 1
    return spans


def strict_entities(tags):
    """Maximal runs of B-x I-x I-x ..., by trying every place."""
    spans = []
    for first, tag in enumerate(tags):
        if tag.startswith("B-"):
            behind = first + 1
            while behind < len(tags) and tags[behind] == f"I-{tag[2:]}":
                behind += 1
            spans.append((tag[2:], first, behind))
    return spans


def micro_f1(spans, answers, golds):
    pairs = [(set(spans(a)), set(spans(g))) for a, g in zip(answers, golds, strict=True)]
    found, total = sum(len(a & g) for a, g in pairs), sum(len(a) + len(g) for a, g in pairs)
    return 2 * found / total if total else 0.0


def own_f1(answers, golds, *, strict=False):
    return float(metrics_of(totals(answers, golds, strict=strict))["f1"])


def totals(answers, golds, *, strict=False):
    return sum(counts_of(a, g, TYPES, entities=True, strict=strict) for a, g in zip(answers, golds, strict=True))


def test_entities_of_random_tags_follow_the_definitions():
    generator = random.Random(0)
    for _ in range(10_000):
        tags = random_tags(generator, "BI", generator.randint(1, 12))
        assert entities_of(tags) == conlleval_entities(tags)
        assert entities_of(tags, strict=True) == strict_entities(tags)


def test_f1_of_random_tags_follows_the_definitions():
    generator = random.Random(1)
    golds = [random_tags(generator, "BI", generator.randint(1, 20)) for _ in range(2000)]
    answers = [[t if generator.random() < 0.7 else random_tags(generator, "BI", 1)[0] for t in g] for g in golds]
    assert own_f1(answers, golds) == pytest.approx(micro_f1(conlleval_entities, answers, golds), abs=1e-12)
    assert own_f1(answers, golds, strict=True) == pytest.approx(micro_f1(strict_entities, answers, golds), abs=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("prefixes", ["BI", "BIES"])
def test_f1_of_ten_thousand_random_sequences_equals_seqevals(prefixes):
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    from seqeval.scheme import IOB2

    generator = random.Random(2)
    golds = [random_tags(generator, prefixes, generator.randint(1, 12)) for _ in range(10_000)]
    answers = [[t if generator.random() < 0.6 else random_tags(generator, prefixes, 1)[0] for t in g] for g in golds]
    assert own_f1(answers, golds) == pytest.approx(metrics.f1_score(golds, answers), abs=1e-12)
    report = metrics.classification_report(golds, answers, output_dict=True)
    for row in table_of(totals(answers, golds), TYPES):
        other = report[row["label"]]
        assert [row[k] for k in ("precision", "recall", "f1", "support")] == pytest.approx(
            [other[k] for k in ("precision", "recall", "f1-score", "support")]
        )
    if prefixes == "BI":
        theirs = metrics.f1_score(golds, answers, mode="strict", scheme=IOB2)
        assert own_f1(answers, golds, strict=True) == pytest.approx(theirs, abs=1e-12)


def test_schemes_are_told_and_turn_into_one_another():
    generator = random.Random(3)
    for _ in range(500):
        bio = as_bio(random_tags(generator, "BI", generator.randint(1, 15)))
        for scheme in ("BIO", "IOB1", "IOBES"):
            tags = written(entities_of(bio), len(bio), scheme)
            assert entities_of(tags) == entities_of(bio)
            assert as_bio(tags) == bio
    assert scheme_of([["B-A", "I-A", "O"]]) == "BIO"
    assert scheme_of([["O", "I-A", "B-A"]]) == "IOB1"
    assert scheme_of([["B-A", "E-A"]]) == scheme_of([["U-A", "O"]]) == "IOBES"
    assert written([("A", 0, 1), ("A", 1, 3)], 4, "IOB1") == ["I-A", "B-A", "I-A", "O"]
    assert as_bio(["B-A", "I-A", "L-A", "U-B"]) == ["B-A", "I-A", "I-A", "B-B"]
    assert bio_names(["b", "a", "b"]) == ("O", "B-a", "I-a", "B-b", "I-b")


def test_without_entities_scores_are_zero_and_not_nan():
    assert metrics_of(np.zeros(5))["f1"] == 0.0
    names = ("ADJ", "NOUN", "VERB")
    row = counts_of(["NOUN", "VERB"], ["NOUN", "ADJ"], types_of(names), entities=False)
    assert float(metrics_of(row)["accuracy"]) == 0.5
    assert [(r["label"], r["recall"], r["support"]) for r in table_of(row, types_of(names))] == [
        ("ADJ", 0.0, 1), ("NOUN", 1.0, 1), ("VERB", 0.0, 0)
    ]  # fmt: skip
    assert types_of(bio_names(["b", "a"])) == ("a", "b")


FILES = {
    "wnut.conll": "EU\tB-ORG\nrejects\tO\n\nPeter\tB-PER\nBlackburn\tI-PER\n",
    "eng.train": "-DOCSTART- -X- O O\n\nEU NNP I-NP B-ORG\nrejects VBZ I-VP O\n\nPeter NNP I-NP B-PER\n"
    "Blackburn NNP I-NP I-PER\n\n",
    "two.jsonl": json.dumps({"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}) + "\n\n"
    + json.dumps({"tokens": ["Peter", "Blackburn"], "tags": ["B-PER", "I-PER"]}) + "\n",
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_are_known_and_read(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    assert holds_tags(str(path))
    assert read_sentences(str(path)) == [
        (["EU", "rejects"], ["B-ORG", "O"]),
        (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    ]


def test_universal_dependencies_and_words_alone(tmp_path):
    line = "{}\t{}\t_\t{}\t_\t_\t0\troot\t_\t_\n"
    text = "# text = We don't\n" + line.format(1, "We", "PRON") + line.format("2-3", "don't", "_")
    text += line.format(2, "do", "AUX") + line.format(3, "n't", "PART") + "\n"
    (tmp_path / "a.conllu").write_text(text)
    assert read_sentences(str(tmp_path / "a.conllu")) == [(["We", "do", "n't"], ["PRON", "AUX", "PART"])]
    (tmp_path / "a.conll").write_text("We\ndo\n\nGo\n")
    assert read_sentences(str(tmp_path / "a.conll")) == [(["We", "do"], None), (["Go"], None)]


def test_other_files_are_left_to_others(tmp_path):
    for name, text in (
        ("a.csv", "text,label\na,b\n"),
        ("a.txt", "Some prose of\nmany words.\n"),
        ("a.jsonl", '{"text": "a"}\n'),
    ):
        (tmp_path / name).write_text(text)
        assert not holds_tags(str(tmp_path / name))
    assert not holds_tags("glue/sst2")


@pytest.mark.parametrize(("name", "text", "told"), [
    ("a.conll", "EU B-ORG\nrejects\n", "line 2 has 1 column"),
    ("a.conll", "\n\n", "no sentence in it"),
    ("a.jsonl", '{"tokens": ["a"], "tags": []}\n', "line 1: tokens must be words"),
    ("a.jsonl", "[]\n", "line 1 is no"),
    ("a.conllu", "1\tWe\n", "line 1 has 2 columns"),
])  # fmt: skip
def test_mistakes_in_files_name_the_line(tmp_path, name, text, told):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        read_sentences(str(tmp_path / name))
