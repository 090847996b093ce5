"""Published tasks: their files read as they are, splits without leaks, encoding of spans and choices, and losses."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
from published_toys import NLI, write_glue, write_race, write_squad, write_swag, write_teacher

from engine.data import DataConfig, encode_task, load_task
from engine.data.catalog import GLUE_TASKS, TASKS, published
from engine.data.parts import split
from engine.data.published_files import find_split, read_split
from engine.data.task import head_of
from engine.distill.target_store import Layout, Store
from engine.errors import UserError
from engine.objective import KDWeights, kd_loss
from engine.states import EncoderStates
from engine.teacher import Teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    write_glue(folder / "glue")
    for name, version in (("squad", "v1.1"), ("squad2", "v2.0")):
        write_squad(folder / name / f"train-{version}.json", version=version)
        write_squad(folder / name / f"dev-{version}.json", 6, seed=1, version=version)
    write_swag(folder / "SWAG")
    write_race(folder / "RACE")
    write_teacher(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Teacher.load(folder / "teacher").tokenizer


def rows_of(folder, name, split, labelled=True):
    task = published(name)
    return read_split(task, find_split(task, str(folder), split), labelled=labelled)


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_glue_files_give_texts_labels_and_names(folder, name):
    """Labels are recomputed from the words the generator put into the texts."""
    from published_toys import BAD, GOOD

    spec = TASKS[name].spec
    for part, count in (("train", 60), ("dev", 20)):
        rows = rows_of(folder, name, part)
        assert len(rows) == count
        assert len(rows.texts) == len(spec.text_columns)
        for texts, label in zip(zip(*rows.texts, strict=True), rows.labels.tolist(), strict=True):
            words = set(" ".join(texts).split())
            if spec.kind == "regression":
                assert (label > 2.5) == bool(words & set(GOOD))
            elif name == "glue/mnli":
                assert words & set(NLI[spec.label_names[label]])
                assert "(" not in words  # the sentence, not its parse
            else:
                positive = spec.label_names[label] in {
                    "acceptable", "positive", "equivalent", "duplicate", "entailment",
                }  # fmt: skip
                assert bool(words & set(GOOD)) == positive
                assert bool(words & set(BAD)) != positive
    test = rows_of(folder, name, "test", labelled=False)
    assert test.ids == [str(i) for i in range(15)]
    assert test.labels is None
    if name == "glue/cola":
        assert sum('"' in t for t in rows_of(folder, name, "train").texts[0]) == 30


def test_separators_inside_a_line_do_not_cut_it(tmp_path):
    (tmp_path / "train.tsv").write_bytes('sentence\tlabel\na\u2028b\rc "d\t1\nplain\t0\r\n'.encode())
    rows = read_split(published("glue/sst2"), str(tmp_path / "train.tsv"))
    assert rows.texts[0] == ['a\u2028b\rc "d', "plain"]
    assert rows.labels.tolist() == [1, 0]


def test_mnli_has_two_dev_splits_and_dev_is_never_trained_on(folder):
    data = load_task(DataConfig(task="glue/mnli", dir=str(folder), min_held_out=5))
    assert list(data.further) == ["dev_mismatched"]
    held = {
        t for part in (data.dev, data.score, data.select, *data.further.values()) for t in zip(*part.texts, strict=True)
    }
    assert not held & set(zip(*data.train.texts, strict=True))
    assert data.spec.metric == "accuracy"
    assert data.spec.label_names == ("entailment", "neutral", "contradiction")


def test_squad_keeps_every_answer_and_groups_contexts(folder):
    raw = json.loads((folder / "squad2" / "train-v2.0.json").read_text())
    items = {q["id"]: (q, p["context"]) for a in raw["data"] for p in a["paragraphs"] for q in p["qas"]}
    data = load_task(DataConfig(task="squad_v2", dir=str(folder / "squad2"), min_held_out=8))
    assert data.spec.no_answer
    for part in (data.train, data.score, data.select):
        for question, context, name, gold in zip(*part.texts, part.ids, part.golds, strict=True):
            item, expected = items[name]
            assert (question, context) == (item["question"].strip(), expected)
            assert list(gold.texts) == [a["text"] for a in item["answers"]]
            assert all(context[s : s + len(t)] == t for s, t in zip(gold.starts, gold.texts, strict=True))
    contexts = [set(part.texts[1]) for part in (data.train, data.score, data.select, data.dev)]
    assert sum(map(len, contexts)) == len(set.union(*contexts))


def test_swag_and_race_give_whole_texts_per_choice(folder):
    swag = rows_of(folder, "swag", "train")
    assert len(swag.texts) == 5
    assert swag.texts[1][0].startswith("It is, ")
    for name, count in (("race", 48), ("race/middle", 24), ("race/high", 24)):
        race = rows_of(folder, name, "train")
        assert len(race) == count
        assert not any("_" in text for column in race.texts[1:] for text in column)
        assert any(text.startswith("Who lives in the house ? ") for text in race.texts[1])
    for rows in (swag, rows_of(folder, "race", "train")):
        from published_toys import GOOD

        for i, label in enumerate(rows.labels.tolist()):
            good = [bool(set(column[i].split()) & set(GOOD)) for column in rows.texts[1:]]
            assert good.index(True) == label
    data = load_task(DataConfig(task="race", dir=str(folder), min_held_out=4))
    shared = [set(part.texts[0]) for part in (data.train, data.score, data.select, data.dev)]
    assert sum(map(len, shared)) == len(set.union(*shared))


WRONG = {
    "unknown": ({"task": "glue/mnlii"}, "not known"),
    "no file": ({"task": "glue/rte", "dir": "{}/SWAG"}, "no train.tsv"),
    "no training": ({"task": "glue/ax"}, "no training data"),
    "columns": ({"task": "glue/rte", "label_column": "y"}, "label_column"),
    "dir alone": ({"dir": "{}"}, "data.task"),
    "v2 as v1": ({"task": "squad", "dir": "{}/squad2", "train": "{}/squad2/train-v2.0.json"}, "has no answer"),
    "other header": ({"task": "glue/rte", "dir": "{}", "train": "{}/glue/SST-2/train.tsv"}, "no column 'sentence1'"),
    "twice": ({"task": "glue/rte", "dir": "{}", "tasks": "glue/rte"}, "twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(folder, case):
    options, words = WRONG[case]
    options = {name: value.replace("{}", str(folder)) for name, value in options.items()}
    with pytest.raises(UserError, match=words) as error:
        load_task(DataConfig(**options))
    assert len(str(error.value).splitlines()) == 1


def test_squad_whose_answer_is_elsewhere_is_refused(folder, tmp_path):
    raw = json.loads((folder / "squad" / "train-v1.1.json").read_text())
    raw["data"][0]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] += 1
    (tmp_path / "train-v1.1.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="does not stand at character"):
        load_task(DataConfig(task="squad", dir=str(tmp_path)))


@pytest.mark.parametrize("max_length", [24, 30, 96])
def test_labelled_tokens_are_the_answer_in_every_window(folder, tokenizer, max_length):
    rows = rows_of(folder / "squad2", "squad_v2", "train")
    data = encode_task(rows, TASKS["squad_v2"].spec, tokenizer, max_length, stride=4)
    assert data.lengths.max() <= max_length
    assert (len(data) > len(rows)) == (max_length < 96)
    found = set()
    for i in range(len(data)):
        question = int(data.spans.question[i])
        gold, context = rows.golds[question], rows.texts[1][question]
        first, last = data.labels[i].tolist()
        at = data.offsets[i]
        if (first, last) == (0, 0):
            continue
        assert context[data.spans.start[at + first] : data.spans.end[at + last]] == gold.texts[0]
        assert tokenizer.decode(data.row(i)[first : last + 1].tolist()).casefold() == gold.texts[0].casefold()
        found.add(question)
    # every answerable question has its answer whole in some window: the overlap is longer than any answer
    assert found == {i for i, gold in enumerate(rows.golds) if gold.texts}


def test_question_that_is_too_long_is_cut(tokenizer):
    from engine.data.rows import Gold, Rows

    rows = Rows((["cat " * 200], ["Anna lives in Rome."]), None, ["1"], [Gold(("Rome",), (14,))])
    data = encode_task(rows, TASKS["squad"].spec, tokenizer, 40)
    assert data.lengths.max() <= 40
    assert data.labels.tolist() != [[0, 0]]


def test_choices_are_the_pairs_the_tokenizer_makes(folder, tokenizer):
    rows = rows_of(folder, "swag", "train")
    spec = TASKS["swag"].spec
    data = encode_task(rows, spec, tokenizer, 12)
    batch = data.collate([3, 0])
    assert batch.input_ids.shape[:2] == (2, 4)
    assert batch.labels.tolist() == rows.labels[[3, 0]].tolist()
    for place, row in enumerate([3, 0]):
        for choice in range(4):
            expected = tokenizer(
                rows.texts[0][row], rows.texts[choice + 1][row], truncation="longest_first", max_length=12
            )
            real = batch.attention_mask[place, choice]
            assert batch.input_ids[place, choice][real].tolist() == expected["input_ids"]
            assert batch.token_type_ids[place, choice][real].tolist() == expected["token_type_ids"]
    chosen = data.select([5, 2])
    assert torch.equal(chosen.collate([1]).input_ids, data.collate([2]).input_ids)
    parts = split(batch, ranks=1, micro_batches=2)
    assert [tuple(p.batch.input_ids.shape[:2]) for p in parts] == [(1, 4), (1, 4)]
    assert sum(p.tokens for p in parts) == pytest.approx(1)
    assert sum(p.pairs for p in parts) == pytest.approx(1)


def test_span_distillation_is_the_mean_over_real_positions():
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 7, 2, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(7) < torch.tensor([7, 4, 1])[:, None]
    empty = torch.zeros(3, 7, 4)

    def loss(s, t):
        weights = KDWeights(temperature=2.0)
        parts = (EncoderStates(empty, logits=x) for x in (s, t))
        return kd_loss(
            *parts, mask, fit_dense=None, weights=weights, terms=("prediction",), head=head_of("question_answering")
        ).prediction

    expected = 0.0
    for row, length in enumerate((7, 4, 1)):
        for side in range(2):
            p = (teacher[row, :length, side] / 2).softmax(0)
            expected -= 4 * (p * (student[row, :length, side] / 2).log_softmax(0)).sum() / 6
    # computed in float32: about seven digits
    assert loss(student, teacher).item() == pytest.approx(expected.item(), rel=1e-5)
    other = torch.where(mask[..., None], student, torch.full_like(student, 50.0))
    assert loss(other, teacher).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("glue/sst2", (8, 2)), ("squad", (8, 5, 2)), ("swag", (2, 4))],
    ids=["classes", "spans", "choices"],
)
def test_stored_answers_of_every_kind_come_back(tmp_path, name, shape):
    heads = torch.randn(8, 2, 5, 4).transpose(1, 2).contiguous().transpose(1, 2)
    states = EncoderStates(torch.randn(8, 5, 8), (torch.randn(8, 5, 8),), (heads,), (heads + 1,), torch.randn(shape))
    shapes, spec = {(0, 0): (8, 5)}, TASKS[name].spec
    layout = Layout.of(states, shapes, partial(spec.head.answer_shape, spec), "exact")
    store = Store.create(tmp_path / "s", "key", layout)
    store.write((0, 0), states)
    found = store.read((0, 0), torch.device("cpu"))
    assert found.logits.shape == shape
    assert torch.equal(found.logits, states.logits)
    assert torch.equal(found.hidden[0], states.hidden[0])
    assert torch.equal(found.keys[0], states.keys[0])
    store.close()


@pytest.mark.parametrize("name", ["squad_v2", "swag"])
def test_teacher_gives_the_states_of_rows_and_answers_of_the_task(folder, tokenizer, name):
    spec = TASKS[name].spec
    rows = rows_of(folder / "squad2" if name == "squad_v2" else folder, name, "dev")
    batch = encode_task(rows, spec, tokenizer, 40).collate([0, 3, 1])
    teacher = Teacher.load(folder / "teacher", spec)
    states = teacher.states(batch, [0, 1])
    rows = 3 if spec.head.windows else 12
    assert states.hidden[0].shape[0] == states.queries[0].shape[0] == rows
    assert states.logits.shape == ((3, batch.input_ids.shape[1], 2) if spec.head.windows else (3, 4))
    text = teacher.states(batch, [1], need_logits=False)
    assert torch.equal(text.hidden[0], states.hidden[1])
    output = teacher.model(**teacher.inputs(batch))
    expected = output.start_logits if spec.head.windows else output.logits
    assert torch.equal(states.logits[..., 0] if spec.head.windows else states.logits, expected)


def test_held_out_groups_are_whole_and_seeded():
    from engine.data.rows import Rows
    from engine.data.splits import hold_out_groups

    rng = random.Random(0)
    groups = [f"g{rng.randrange(20)}" for _ in range(100)]
    rows = Rows(([str(i) for i in range(100)],))
    rest, parts = hold_out_groups(rows, [10, 10], 0, groups)
    names = [{groups[int(t)] for t in part.texts[0]} for part in (rest, *parts)]
    assert not names[0] & names[1]
    assert not names[1] & names[2]
    assert sum(map(len, (rest, *parts))) == 100
    assert 10 <= len(parts[0]) < 10 + max(np.unique(groups, return_counts=True)[1])
    assert hold_out_groups(rows, [10, 10], 0, groups)[1][0].texts == parts[0].texts
    assert hold_out_groups(rows, [10, 10], 1, groups)[1][0].texts != parts[0].texts
