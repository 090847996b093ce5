"""Small files in the formats tasks are published in: GLUE's folder, SQuAD, SWAG, RACE. Words decide the labels."""

import csv
import json
import random
from pathlib import Path

WORDS = ["the", "a", "cat", "dog", "film", "story", "was", "is", "and", "it", "very", "really", "today", "house", "red"]
GOOD, BAD = ["great", "lovely", "superb", "happy"], ["awful", "broken", "poor", "sad"]
NAMES = ["anna", "boris", "clara", "david", "emma", "fritz", "greta", "hans"]
PLACES = ["paris", "london", "berlin", "madrid", "rome", "vienna", "oslo", "bern"]
ASKED = ["where", "who", "lives", "in", "does", "live", "?", "."]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *GOOD, *BAD, *NAMES, *PLACES, *ASKED, '"', ","]

NLI = {"entailment": GOOD, "neutral": WORDS[:4], "contradiction": BAD}


def _text(rng: random.Random, words: list[str], marks: list[str], length: int = 5) -> str:
    chosen = rng.choices(words, k=length) + rng.choices(marks, k=2)
    rng.shuffle(chosen)
    return " ".join(chosen)


def _lines(path: Path, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join("\t".join(map(str, row)) + "\n" for row in rows).encode())


def write_glue(folder: Path, rows: int = 60, seed: int = 0) -> None:
    """All nine tasks and the diagnostics, with the columns, headers and quirks of the published files."""
    rng = random.Random(seed)

    def marked(label: int) -> str:
        return _text(rng, WORDS, GOOD if label else BAD)

    for split, count in (("train", rows), ("dev", rows // 3), ("test", rows // 4)):
        labels = [i % 2 for i in range(count)]
        test = split == "test"
        cola = [["gj04", y, "" if y else "*", marked(y) + (' "' if y else "")] for y in labels]  # a lone quotation mark
        head = [["index", "sentence"]]
        _lines(folder / f"CoLA/{split}.tsv", [*head, *([i, r[3]] for i, r in enumerate(cola))] if test else cola)
        sst = [[i, marked(y) + " "] if test else [marked(y) + " ", y] for i, y in enumerate(labels)]
        _lines(folder / f"SST-2/{split}.tsv", [["index", "sentence"] if test else ["sentence", "label"], *sst])
        ids = ["#1 ID", "#2 ID", "#1 String", "#2 String"]
        mrpc = [[i if test else y, 100 + i, 200 + i, marked(y), marked(y)] for i, y in enumerate(labels)]
        _lines(folder / f"MRPC/{split}.tsv", [["index" if test else "Quality", *ids], *mrpc])
        qqp = [[i, 300 + i, 400 + i, marked(y), marked(y), y] for i, y in enumerate(labels)]
        columns = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        if test:
            _lines(folder / f"QQP/{split}.tsv", [["id", *columns[3:5]], *([r[0], *r[3:5]] for r in qqp)])
        else:
            _lines(folder / f"QQP/{split}.tsv", [columns, *qqp])
        scores = [round(rng.uniform(0, 5), 3) for _ in range(count)]
        sts = [
            [i, "main-news", "x", "2012test", "0001", "none", "none", marked(s > 2.5), marked(s > 2.5), s]
            for i, s in enumerate(scores)
        ]
        columns = ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2"]
        _lines(
            folder / f"STS-B/{split}.tsv",
            [columns if test else [*columns, "score"], *(r[:-1] if test else r for r in sts)],
        )
        for task, first, second in (("QNLI", "question", "sentence"), ("RTE", "sentence1", "sentence2")):
            pairs = [[i, marked(y), marked(y), ["not_entailment", "entailment"][y]] for i, y in enumerate(labels)]
            columns = ["index", first, second, "label"]
            _lines(
                folder / f"{task}/{split}.tsv",
                [columns[:-1] if test else columns, *(r[:-1] if test else r for r in pairs)],
            )
        wnli = [[i, marked(y), marked(y), y] for i, y in enumerate(labels)]
        columns = ["index", "sentence1", "sentence2", "label"]
        _lines(
            folder / f"WNLI/{split}.tsv", [columns[:-1] if test else columns, *(r[:-1] if test else r for r in wnli)]
        )
        for name in ("train",) if split == "train" else (f"{split}_matched", f"{split}_mismatched"):
            _lines(folder / f"MNLI/{name}.tsv", _mnli(rng, split, count))
    _lines(
        folder / "AX/diagnostic.tsv",
        [["index", "sentence1", "sentence2"], *([i, marked(i % 2), marked(i % 2)] for i in range(10))],
    )


def _mnli(rng: random.Random, split: str, count: int) -> list[list[object]]:
    parses = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse", "sentence2_parse"]
    columns = ["index", "promptID", "pairID", "genre", *parses, "sentence1", "sentence2"]
    annotators = {"train": ["label1"], "dev": [f"label{i}" for i in range(1, 6)], "test": []}[split]
    gold = [] if split == "test" else ["gold_label"]
    rows: list[list[object]] = [[*columns, *annotators, *gold]]
    for i in range(count):
        label = list(NLI)[i % 3]
        # binary parses carry parentheses, and the annotators' labels are not the gold one
        texts = [_text(rng, WORDS, NLI[label]) for _ in range(2)]
        parse = [f"( {t} )" for t in (*texts, *texts)]
        rows.append([i, 1, 2, "fiction", *parse, *texts, *(["neutral"] * len(annotators)), *([label] if gold else [])])
    return rows


def write_squad(path: Path, contexts: int = 20, seed: int = 0, *, version: str = "v2.0") -> None:
    """Who lives where; in v2.0 a third of the questions ask for a place that nobody lives in. Two answers each."""
    rng = random.Random(seed)
    articles, number = [], 0
    for _ in range(contexts):
        people, places = rng.sample(NAMES, 3), rng.sample(PLACES, 4)
        context = " ".join(
            f"{p.capitalize()} lives in {c.capitalize()} and it is very red."
            for p, c in zip(people, places, strict=False)
        )
        qas = []
        for person, place in zip(people, places, strict=False):
            number += 1
            start = context.index(person.capitalize())
            answers = [{"text": person.capitalize(), "answer_start": start}] * 2
            item = {"id": f"q{number}", "question": f" Who lives in {place}?", "answers": answers}
            qas.append(item if version == "v1.1" else {**item, "is_impossible": False})
        if version == "v2.0":
            number += 1
            question = f"Who lives in {places[3]}?"
            plausible = [{"text": people[0].capitalize(), "answer_start": 0}]
            impossible = {"is_impossible": True, "answers": [], "plausible_answers": plausible}
            qas.append({"id": f"q{number}", "question": question, **impossible})
        articles.append({"title": "x", "paragraphs": [{"context": context, "qas": qas}]})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": version, "data": articles}))


def write_swag(folder: Path, rows: int = 60, seed: int = 0) -> None:
    """The right ending is the only one with a good word."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", rows), ("val", rows // 3), ("test", rows // 4)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            columns = ["", "video-id", "fold-ind", "startphrase", "sent1", "sent2", "gold-source"]
            endings = [f"ending{i}" for i in range(4)]
            writer.writerow([*columns, *endings, *([] if name == "test" else ["label"])])
            for i in range(count):
                right = rng.randrange(4)
                texts = [_text(rng, WORDS, GOOD if k == right else BAD, 3) for k in range(4)]
                first = f"{i} " + _text(rng, WORDS, NAMES)
                row = [i, f"v{i}", i, first, first, "It is, ", "gold", *texts]
                writer.writerow([*row, *([] if name == "test" else [right])])


def write_race(folder: Path, articles: int = 12, seed: int = 0) -> None:
    """Two questions an article, one of them with a blank to fill in."""
    rng = random.Random(seed)
    for split, count in (("train", articles), ("dev", articles // 2), ("test", articles // 2)):
        for level in ("middle", "high"):
            place = folder / split / level
            place.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                answers, options = [], []
                for _ in range(2):
                    right = rng.randrange(4)
                    answers.append("ABCD"[right])
                    options.append([_text(rng, WORDS, GOOD if k == right else BAD, 2) for k in range(4)])
                data = {
                    "article": f"{split} {level} {i} . " + _text(rng, WORDS, PLACES, 12),
                    "questions": ["It is _ today .", "Who lives in the house ?"],
                    "options": options,
                    "answers": answers,
                    "id": f"{level}{i}.txt",
                }
                (place / f"{i}.txt").write_text(json.dumps(data))


def write_teacher(folder: Path, *, max_positions: int = 96) -> Path:
    """A tiny random BERT whose vocabulary is the toys'."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=max_positions,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
