"""A kind of task that only this file knows goes from its files to predictions: one class, one registration."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from finetune_toys import source  # noqa: F401  a fixture
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

from engine.architecture.architecture import uniform
from engine.architecture.shape import ModelShape
from engine.data import DataConfig, load_task
from engine.data.describe import describe
from engine.data.results import Measured, Predictions
from engine.data.rows import NO_LABEL, Rows
from engine.data.task import TaskHead, TaskSpec, head_of, heads, register
from engine.data.task_data import FileRead, Understood
from engine.data.tokenizing import pack
from engine.distill import Distiller, Member, PopulationStep
from engine.distill.target_cache import BatchPlan, DiskTargets
from engine.errors import UserError
from engine.evaluation.evaluation import answers_of, evaluate, evaluate_dev
from engine.handover.known import HandOver
from engine.objective import KDWeights
from engine.student.heads import HeadedModel, with_logits
from engine.student.modeling import FFNASModel
from engine.student.supernet import build_student
from engine.teacher import FinetuneSettings
from engine.teacher.finetune import finetune
from engine.training.loop import cycle
from engine.training.settings import PhaseSettings
from kernels.language.expression import parse_expression

NAMES = ("vowel", "consonant")
GELU = parse_expression("linear(gelu(linear(x,wb1)),wb2)")


@dataclass(frozen=True)
class Tags:
    """Of the words of one row."""

    ids: tuple[int, ...]


@dataclass
class TaggerOutput(TokenClassifierOutput):
    states: object = None


class FFNASForTags(HeadedModel):
    hand_over = HandOver("AutoModelForTokenClassification", "token-classification")

    def __init__(self, config):
        super().__init__(config)
        self.ffnas = FFNASModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, **kwargs):
        out = self.ffnas(input_ids, attention_mask, token_type_ids, **{**kwargs, "return_dict": True})
        logits = self.classify(out.last_hidden_state)
        return TaggerOutput(logits=logits, states=with_logits(out.states, logits))

    def classify(self, hidden, attention_mask=None):
        return self.classifier(hidden)


class LetterTags(TaskHead):
    """A tag for every letter of a line; files are lines of letters and lines of tags, in turn."""

    kind = "letter_tags"
    metrics = ("letters_right",)
    label_dtype = None
    kept = "right"
    suffixes = (".json",)

    def check(self, spec):
        if not spec.label_names:
            raise UserError(f"task {spec.name!r} has no tags: name them")

    def reads(self, source):  # noqa: F811
        return source.endswith(".tags")

    def read(self, config, notes):
        spec = TaskSpec("letters", self.kind, ("text",), "tags", NAMES, "letters_right")
        lines = Path(config.train).read_text().splitlines()
        golds = [Tags(tuple(NAMES.index(word) for word in line.split())) for line in lines[1::2]]
        rows = Rows((lines[::2],), golds=golds)
        return spec, rows, None, Understood((FileRead("train", config.train, len(rows), "letters and tags"),))

    def encode(self, rows, spec, tokenizer, max_length, *, stride=None, published=False):
        words = [[tokenizer.convert_tokens_to_ids(w) for w in text.split()][: max_length - 2] for text in rows.texts[0]]
        ids = [np.array([tokenizer.cls_token_id, *row, tokenizer.sep_token_id], dtype=np.int32) for row in words]
        golds = rows.golds or [Tags((NO_LABEL,) * len(row)) for row in words]
        labels = [(NO_LABEL, *gold.ids[: len(row)], NO_LABEL) for gold, row in zip(golds, words, strict=True)]
        lengths = [len(row) for row in ids]
        flat = np.array([tag for row in labels for tag in row], dtype=np.int64)
        return pack(ids, lengths, lengths, flat, tokenizer, truncated=0, labels_per_token=True)

    def student_class(self):
        return FFNASForTags

    def config_fields(self, spec):
        return {"num_labels": len(NAMES), "id2label": dict(enumerate(NAMES))}

    def spec_of(self, config):
        is_own = config["architectures"] == ["BertForTokenClassification"]
        return TaskSpec("rows", self.kind, ("text",), "tags", NAMES, "letters_right") if is_own else None

    def answer_shape(self, spec, rows, columns):
        return (rows, columns, spec.num_labels)

    def gold_loss(self, logits, labels):
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NO_LABEL)

    def teacher_loss(self, student, teacher, mask, temperature):
        return (student - teacher)[mask].square().mean()

    def prediction_loss(self, student, teacher, mask, labels, *, temperature, paper_exact):
        return self.teacher_loss(student, teacher, mask, temperature)

    def answer(self, spec, data, found):
        tags = {}
        for rows, logits in found:
            for row, one in zip(rows.tolist(), logits.argmax(-1).tolist(), strict=True):
                tags[row] = one[1 : int(data.lengths[row]) - 1]
        return [tags[row] for row in range(len(data))]

    def gold(self, rows):
        return rows.golds

    def gold_of(self, data):
        return [Tags(tuple(t for t in data.labels[a:b].tolist() if t != NO_LABEL)) for a, b in
                zip(data.offsets[:-1], data.offsets[1:], strict=True)]  # fmt: skip

    def score(self, spec, answers, gold, *, kept=None, threshold=0.0):
        right = np.array([np.mean(np.equal(a, g.ids)) for a, g in zip(answers, gold, strict=True)], dtype=np.float32)
        return Measured({"letters_right": float(right.mean())}, lambda: right[:, None])

    def kept_columns(self, spec):
        return 1

    def metric(self, spec, rows, labels):
        return float(rows.mean())

    def resampled(self, spec, rows, labels, counts):
        return counts @ rows[:, 0] / len(rows)

    def predictions(self, spec, key, names, answers, *, every, threshold):
        return Predictions(document={str(n): [NAMES[t] for t in a] for n, a in zip(names, answers, strict=True)})


@pytest.fixture(scope="module")
def kind():
    from engine.data import task

    register(LetterTags())
    yield
    task._HEADS.pop(LetterTags.kind)


def tag(letter):
    return NAMES[letter not in "aeiou"]


@pytest.fixture(scope="module")
def data(kind, tmp_path_factory):
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(300):
        letters = generator.choice(list("abcdefghijklmnopqrstuvwxyz"), generator.integers(2, 9)).tolist()
        lines += [" ".join(letters), " ".join(map(tag, letters))]
    path = tmp_path_factory.mktemp("tags") / "letters.tags"
    path.write_text("\n".join(lines))
    return load_task(DataConfig(train=str(path)))


@pytest.fixture(scope="module")
def taught(data, source, tmp_path_factory):  # noqa: F811
    from engine.model_sources import load_tokenizer, resolve

    encoded = data.encode(load_tokenizer(resolve(str(source))), 16)
    settings = FinetuneSettings(epochs=6, lr=3e-3, batch_size=16, freeze_embeddings=False)
    return encoded, finetune(str(source), encoded, settings, tmp_path_factory.mktemp("cache"))


def test_its_files_are_read_split_and_described(data):
    assert (data.spec.kind, data.spec.num_labels, data.spec.metrics) == ("letter_tags", 2, ("letters_right",))
    for part in (data.train, data.score, data.select, data.dev):
        for text, gold in zip(part.texts[0], part.golds, strict=True):
            assert list(map(tag, text.split())) == [NAMES[i] for i in gold.ids]
    assert any(line.startswith("task    letters: letter tags") for line in describe(data, 16))


def test_its_labels_stand_beside_its_tokens(data, taught):
    encoded, _ = taught
    batch = next(encoded.train.batches(4, seed=1))
    assert batch.labels.shape == batch.input_ids.shape
    assert ((batch.labels == NO_LABEL) | batch.attention_mask).all()
    again = encoded.train.select([5, 2])
    assert again.labels.tolist() == [*encoded.train.select([5]).labels.tolist(), *encoded.train.select([2]).labels]


def test_its_teacher_learns_and_is_scored(data, taught):
    encoded, teacher = taught
    assert type(teacher.model).__name__ == "BertForTokenClassification"
    assert teacher.metrics["letters_right"] > 0.9
    kept = []
    metrics = evaluate_dev(teacher.model, encoded, keep=kept.append)
    assert kept[0].shape == (len(data.dev), 1)
    assert metrics["letters_right"] == pytest.approx(data.spec.head.metric(data.spec, kept[0], None))
    right = [
        np.mean([tag(x) == NAMES[t] for x, t in zip(text.split(), tags, strict=True)])
        for text, tags in zip(data.dev.texts[0], answers_of(teacher.model, encoded.dev, data.spec), strict=True)
    ]
    assert metrics["letters_right"] == pytest.approx(np.mean(right))


def make_student(spec, teacher):
    shape = ModelShape(24, 2, 48, 31, embedding_size=None, max_positions=24, teacher_hidden_size=teacher.hidden_size)
    return build_student(shape, uniform(GELU, 1, Fraction(1), 2), heads=2, task=spec, seed=0)


def test_its_students_distil_alone_mixed_and_as_a_population(taught, tmp_path):
    encoded, teacher = taught
    spec, batch = encoded.spec, next(encoded.train.batches(8, seed=3))
    distiller = Distiller(teacher, 2, KDWeights(attention=0.0), spec, torch.device("cpu"))
    student = make_student(spec, teacher)
    assert isinstance(student, FFNASForTags)
    loss = distiller.task_loss(student.eval(), batch)
    wanted = teacher.logits(batch)
    own = student(batch.input_ids, batch.attention_mask).logits
    torch.testing.assert_close(loss.prediction, (own - wanted)[batch.attention_mask].square().mean())
    architectures = [uniform(GELU, 1, Fraction(1), 2)] * 2
    mixed = distiller.mixed_loss(student, batch, architectures, task=True)
    torch.testing.assert_close(mixed.prediction, loss.prediction)
    settings = PhaseSettings(steps=30, batch_size=8, lr=3e-3)
    before = evaluate(student, encoded.select, spec)["letters_right"]
    plan = BatchPlan(encoded.train, 8, 0, 30)
    targets = DiskTargets(distiller, need_logits=True, plan=plan, folder=tmp_path, cheaper=lambda *_: True)
    with PopulationStep(distiller, [Member(student)], settings, 30, "task", targets=targets.get) as step:
        for number, given in zip(range(30), cycle(encoded.train, 8, seed=0), strict=False):
            step(given, number)
            kept = targets.get(number, given).logits
            torch.testing.assert_close(kept, teacher.logits(given))
    targets.close()
    assert evaluate(student, encoded.select, spec)["letters_right"] > before


def test_its_models_are_predicted_with(taught, tmp_path, capsys):
    from search.commands.predict import command

    _, teacher = taught
    teacher.save(tmp_path / "model")
    out = tmp_path / "tags.json"
    command([str(tmp_path / "model"), "a b e", "z", "--out", str(out)])
    assert json.loads(out.read_text()) == {"1": ["vowel", "consonant", "vowel"], "2": ["consonant"]}


def test_a_kind_that_nobody_registered_is_refused():
    assert [head.kind for head in heads()][:2] == ["classification", "regression"]
    with pytest.raises(UserError, match="task kind 'parsing' is not known: choose one of classification, regression"):
        head_of("parsing")
    with pytest.raises(UserError, match="not known"):
        TaskSpec("t", "parsing", ("a",), "b")
    assert isinstance(SimpleNamespace(head=head_of("regression")).head, TaskHead)
