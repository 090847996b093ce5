"""Token tables of inherited students: which is chosen, what is counted and trained, and data that fit it."""

from __future__ import annotations

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.architecture.architecture import SKIP, Architecture, LayerSpec
from engine.data import Rows, TaskData, TaskSpec
from engine.errors import UserError
from engine.evaluation.evaluation import evaluate_dev
from engine.student import FFNASConfig, FFNASForSequenceClassification
from engine.student.supernet import extract
from kernels.language.expression import GELU_FFN
from search.config.options import parse
from search.config.schema import SearchConfig
from search.inherit import total
from search.inherit.total import Table, Tables
from search.inherit.variants import variants
from search.pipeline import how_inherited

HIDDEN, LAYERS, HEADS = 66, 3, 3
LETTERS = "abcdefgh"
SPEC = TaskSpec("toy", "classification", ("text", "other"), "label", ("no", "yes"), "accuracy")


def words(count, seed, of=4):
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(LETTERS), of)) for _ in range(count)]


KNOWN = list(dict.fromkeys(words(1500, 0)))


def tokenizer(kind="wordpiece"):
    names = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *("##" + c for c in LETTERS), *KNOWN]
    ids = {piece: n for n, piece in enumerate(names)}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]") if kind == "wordpiece" else models.BPE(ids, []))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep")},
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def rows(count, seed, of):
    rng = np.random.default_rng(seed)
    columns = tuple([" ".join(rng.choice(of, rng.integers(1, 6))) for _ in range(count)] for _ in range(2))
    return Rows(columns, rng.integers(0, 2, count))


@pytest.fixture(scope="module")
def run():
    """Of a run, what tables need: a teacher of 3 layers, pairs whose training texts use 200 of 1,500 words."""
    torch.manual_seed(0)
    used = KNOWN[300:500]
    task = TaskData(SPEC, rows(90, 1, used), rows(9, 2, KNOWN), rows(9, 3, KNOWN), rows(31, 4, KNOWN), [" ".join(used)])
    own = tokenizer()
    fields = {"vocab_size": len(own), "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    more = {"intermediate_size": 2 * HIDDEN, "embedding_type": "full", "max_position_embeddings": 20}
    model = FFNASForSequenceClassification(FFNASConfig(**fields, **more, **SPEC.head.config_fields(SPEC))).eval()
    return SimpleNamespace(
        task=task,
        data=task.encode(own, 12),
        device=torch.device("cpu"),
        teacher=SimpleNamespace(model=model, tokenizer=own, max_positions=20),
    )


def tables(run, **settings):
    """Tables of the run under these settings."""
    config = SearchConfig()
    for name, value in settings.items():
        setattr(config.budget if name in ("total", "params") else config.inherit, name, value)
    config.data.max_length = 12
    shape = run.teacher.model.config.shape
    made = variants(shape, GELU_FFN, (Fraction(1, 2),), (Fraction(1),))
    own = SimpleNamespace(**{**vars(run), "config": config})
    return Tables(own, made)


def student(run, skipped=1):
    """A student and its architecture, with layers left out."""
    own = LayerSpec(GELU_FFN, 1, Fraction(1, 2))
    architecture = Architecture((own,) * (LAYERS - skipped) + (SKIP,) * skipped)
    return extract(run.teacher.model, architecture), architecture


def size(model):
    return sum(p.numel() for p in model.parameters())


def test_nothing_asked_nothing_changed(run):
    made = tables(run)
    model, architecture = student(run)
    table = made.choose(architecture)
    assert table == Table(None, False)
    assert made.total(architecture, table) == made.variants.total(architecture)
    same = made.student(model, table)
    assert same is model
    assert made.data(table) is run.data
    assert made.tokenizer_of(table) is None
    frozen = {name for name, p in same.named_parameters() if not p.requires_grad}
    assert frozen == {f"ffnas.embeddings.{n}_embeddings.weight" for n in ("token", "position", "segment")}


@pytest.mark.parametrize(
    "settings", [{"embedding_rank": 5}, {"vocabulary": "seen"}, {"embedding_rank": 7, "vocabulary": "seen"}]
)
def test_sizes_are_as_counted(run, settings, monkeypatch):
    monkeypatch.setattr(total, "FREQUENT", 30)
    made = tables(run, **settings)
    model, architecture = student(run)
    (table,) = made.choices
    assert (table.rank, table.cut) == (settings.get("embedding_rank"), "vocabulary" in settings)
    small = made.student(model, table)
    beside = size(model) - made.variants.total(architecture)
    assert made.total(architecture, table) + beside == size(small)
    assert made.fixed + made.variants.encoder(architecture) == made.total(architecture, table)
    trained = {name.split(".")[2] for name, p in small.named_parameters() if "embeddings" in name and p.requires_grad}
    assert trained == {"layernorm"} | ({"token_embeddings", "dense"} if table.rank else set())


def test_a_cut_student_answers_training_texts_as_the_whole_one_does(run, monkeypatch):
    monkeypatch.setattr(total, "FREQUENT", 30)
    made = tables(run, vocabulary="seen")
    model, architecture = student(run)
    table = made.choose(architecture)
    small, data = made.student(model, table), made.data(table)
    seen = len(np.unique(run.data.train.tokens))
    # padding, [UNK], 16 letters, words of training texts with [CLS] and [SEP], 30 more
    assert small.config.vocab_size == len(made.tokenizer) == seen + 2 + 16 + 30
    for own, other in zip(run.data.train.batches(8, seed=1), data.train.batches(8, seed=1), strict=True):
        back = made.original(other, table)
        assert torch.equal(back.input_ids, own.input_ids)
        with torch.no_grad():
            got = small(other.input_ids, other.attention_mask, other.token_type_ids).logits
            assert torch.equal(got, model(own.input_ids, own.attention_mask, own.token_type_ids).logits)
    for name in ("score", "select", "dev"):
        texts = getattr(run.task, name).texts
        encoded = getattr(data, name)
        for index, pair in enumerate(zip(*texts, strict=True)):
            wanted = made.tokenizer(*pair, truncation="longest_first", max_length=12)["input_ids"]
            assert encoded.row(index).tolist() == wanted
    assert not (data.dev.tokens == made.tokenizer.unk_token_id).any()
    assert (np.diff(data.dev.offsets) >= np.diff(run.data.dev.offsets)).all()
    metrics = evaluate_dev(small, data)
    assert 0 <= metrics["accuracy"] <= 1


@pytest.mark.parametrize("vocabulary", ["full", "seen"])
def test_a_factorized_student_is_fitted_to_what_occurs(run, vocabulary):
    made = tables(run, embedding_rank=20, vocabulary=vocabulary)
    model, _ = student(run)
    embeddings = made.student(model, made.choices[0]).base_model.embeddings
    kept = made.vocabulary.ids.numpy() if vocabulary == "seen" else np.arange(len(run.teacher.tokenizer))
    whole = model.base_model.embeddings.token_embeddings.weight.detach().double().numpy()[kept]
    counts = np.array([(run.data.train.tokens == token).sum() for token in kept]) + 1.0
    mean = counts @ whole / counts.sum()
    left = np.linalg.svd(np.sqrt(counts)[:, None] * (whole - mean), compute_uv=False)[20:]
    found = embeddings.dense(embeddings.token_embeddings.weight).detach().double().numpy()
    np.testing.assert_allclose(counts @ np.square(found - whole).sum(axis=1), np.square(left).sum(), rtol=1e-4)


def test_the_first_table_that_fits_is_taken(run, monkeypatch):
    monkeypatch.setattr(total, "RANKS", (48, 24, 6, 70))
    monkeypatch.setattr(total, "FREQUENT", 0)
    model, architecture = student(run)
    everything = size(run.teacher.model)
    made = tables(run, total=0.5)
    order = [Table(), Table(None, True), Table(48, True), Table(24, True), Table(6, True)]
    assert made.choices == order
    sizes = [size(made.student(extract(model, None), table)) for table in order]
    assert sizes == sorted(sizes, reverse=True)
    for table, enough in zip(order, sizes, strict=True):
        assert tables(run, total=(enough + 0.5) / everything).choose(architecture) == table
    just = tables(run, total=(sizes[-1] + 0.5) / everything)
    assert just.fixed + just.variants.encoder(architecture) <= just.most
    with pytest.raises(UserError, match=r"budget.total: .* raise it, or lower --budget.encoder"):
        tables(run, total=(sizes[-1] - 0.5) / everything).choose(architecture)
    assert tables(run, total=0.5, embedding_rank=9).choices == [Table(9), Table(9, True)]
    assert tables(run, total=0.5, vocabulary="seen").choices == order[1:]


def test_under_a_number_of_parameters_the_layers_keep_a_quarter(run, monkeypatch):
    monkeypatch.setattr(total, "RANKS", (48, 24, 6))
    monkeypatch.setattr(total, "FREQUENT", 0)
    every = tables(run, total=0.5)
    whole = every.variants.whole
    need = [every.total(whole, t) - 0.75 * every.variants.encoder(whole) for t in every.choices]
    for table, enough in zip(every.choices, need, strict=True):
        assert tables(run, params=[0, enough + 1]).choices == [table]
    assert tables(run, params=[0, need[-1] - 1]).choices == every.choices[-1:]
    assert tables(run, params=[0, 1e9]).choices == [Table()]


def test_what_no_student_can_keep_is_refused_before_training(run):
    tables(run, total=0.6).check()
    tables(run).check()
    made = tables(run, total=0.01)
    with pytest.raises(UserError, match=r"budget.total: 0.01: the smallest student has [\d,]+ parameters") as found:
        made.check()
    share = float(re.search(r"parameters, ([\d.]+) of", str(found.value)).group(1))
    tables(run, total=share + 1e-3).check()
    with pytest.raises(UserError, match=r"budget.total"):
        tables(run, total=share - 1e-3).check()
    with pytest.raises(UserError, match=r"budget.params: 500: the smallest student has"):
        tables(run, params=[0, 500]).check()


def test_tokenizers_that_cannot_be_cut_leave_the_rank(run, monkeypatch):
    monkeypatch.setattr(total, "RANKS", (48, 24))
    other = SimpleNamespace(
        **{**vars(run), "teacher": SimpleNamespace(**{**vars(run.teacher), "tokenizer": tokenizer("bpe")})}
    )
    assert tables(other, total=0.5).choices == [Table(), Table(48), Table(24)]
    with pytest.raises(UserError, match=r"inherit.vocabulary: seen: the teacher's tokenizer is BPE.*: use full"):
        tables(other, vocabulary="seen")
    with pytest.raises(UserError, match=r"inherit.embedding_rank: 66 is no less than the teacher's hidden size 66"):
        tables(run, embedding_rank=66)


def test_the_card_says_what_was_made_smaller():
    facts = {"layers": [0, 2], "embedding_rank": None, "vocabulary": 90, "teacher_vocabulary": 90}
    assert how_inherited(facts) == {"strategy": "inherit", "made of": "layers 0, 2 of the teacher, counted from 0"}
    told = how_inherited({**facts, "embedding_rank": 64, "vocabulary": 9000, "teacher_vocabulary": 30522})
    assert told["token table"] == "factorized, rank 64"
    assert "9,000 of the teacher's 30,522 pieces" in told["vocabulary"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--budget.total", "1.5", "budget.total: 1.5 is out of range"),
        ("--budget.total", "0", "budget.total: 0.0 is out of range"),
        ("--inherit.embedding_rank", "0", "inherit.embedding_rank: 0 is out of range"),
        ("--inherit.vocabulary", "small", "inherit.vocabulary: 'small' is not known: choose one of full, seen"),
    ],
)
def test_wrong_settings_end_in_one_line(option, value, message):
    with pytest.raises(UserError, match=message):
        parse([option, value])
