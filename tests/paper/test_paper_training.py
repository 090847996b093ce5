"""`paper_exact`: the objective, its gradients' effect and the learning rates of the published code."""

from __future__ import annotations

import pytest
import torch
from paper_losses import attention_loss, hidden_loss, prediction_loss, published_rates, train
from paper_student import PaperStudent, Sizes, gelu, initialise, released, texts
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertTokenizerFast

from engine.architecture.architecture import Architecture
from engine.data import Batch, TaskSpec
from engine.distill import Distiller
from engine.distill.population import Member, generator_state, train_population
from engine.objective import KDWeights, layer_map
from engine.published.convert import from_published
from engine.published.presets import PRESETS
from engine.teacher import Teacher
from engine.training.loop import run_phase
from engine.training.optim import build_optimizer, linear_schedule, warmup_steps
from engine.training.settings import PhaseSettings

VOCAB, WIDTH, LAYERS = 61, 48, 12
ARCHITECTURE = PRESETS["efficientbert"].architecture
SPECS = {
    "classification": TaskSpec("t", "classification", ("a",), "label", ("x", "y", "z")),
    "regression": TaskSpec("t", "regression", ("a",), "label", metric="pearson"),
    "spans": TaskSpec("t", "question_answering", ("q", "c"), "answers", metric="f1"),
}


def oracle_teacher(model, kind):
    """A BERT's weights in the published arithmetic: tanh GELU and epsilon 1e-5."""
    body = [(lambda x, first, second: second(gelu(first(x))), 1, 1)] * LAYERS
    own = PaperStudent(Sizes(WIDTH, 96, VOCAB, None, teacher=None), body, kind, 3)
    given, state = model.state_dict(), {}
    for name in own.state_dict():
        source = name.replace("encoder.", "encoder.layer.").replace("segment_", "token_type_")
        source = source.replace("token_embeddings", "word_embeddings").replace("layernorm", "LayerNorm")
        for part in ("query", "key", "value"):
            source = source.replace(f"attention.{part}", f"attention.self.{part}")
        for part in ("dense", "LayerNorm"):
            source = source.replace(f"attention.{part}", f"attention.output.{part}")
        source = source.replace("all_ffn.0.dense1", "intermediate.dense").replace("all_ffn.0.dense2", "output.dense")
        source = source.replace("all_ffn.0.LayerNorm", "output.LayerNorm").replace("cls_pooler", "pooler")
        source = source.replace("classifier", "qa_outputs") if kind == "spans" else source
        source = source if source.startswith(("classifier", "qa_outputs")) else f"bert.{source}"
        state[name] = own.state_dict()[name] if ".all_ffn." in source else given[source]
    own.load_state_dict(state)
    return own.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Per kind a random BERT as transformers writes one (erf GELU, 1e-12), as ours loads it, and the oracle."""
    made = {}
    for kind, spec in SPECS.items():
        folder = tmp_path_factory.mktemp(kind)
        (folder / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(56))])
        )
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        config = BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=12,
                            intermediate_size=96, num_labels=1 if kind == "regression" else 3)  # fmt: skip
        model = (BertForQuestionAnswering if kind == "spans" else BertForSequenceClassification)(config)
        initialise(model, 3, wide=True).save_pretrained(folder)
        teacher = Teacher.load(folder, spec, published=True)
        made[kind] = teacher, oracle_teacher(teacher.model, kind), Teacher.load(folder, spec)
    return made


def students(kind, width=24):
    oracle = initialise(PaperStudent(Sizes(width, width, VOCAB, teacher=WIDTH), released(), kind), 7, wide=True)
    options = {"problem_type": "regression"} if kind == "regression" else {}
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return oracle, from_published(oracle.state_dict(), ARCHITECTURE, **options, **zero).model


def batches(kind, count=5, length=9):
    made = []
    for seed in range(count):
        ids, segments, padding = texts(VOCAB, length, seed=seed)
        labels = torch.randn(3, generator=torch.Generator().manual_seed(seed))
        made.append((ids, segments, padding, labels if kind == "regression" else None))
    return made


def as_batch(ids, segments, padding, labels):
    return Batch(ids, padding == 0, segments, labels)


def distiller(teacher, kind, **weights):
    return Distiller(teacher, 6, KDWeights(paper_exact=True, **weights), SPECS[kind], torch.device("cpu"))


MAPPED = [1, 3, 5, 7, 9, 11]


def test_the_teacher_is_the_published_bert(teachers):
    """Its states too; and it is another model than the one transformers runs."""
    for kind, (teacher, oracle, plain) in teachers.items():
        batch = batches(kind, 1)[0]
        with torch.no_grad():
            expected = oracle(*batch[:3])
        states = teacher.states(as_batch(*batch), MAPPED)
        real = batch[2] == 0
        for own, layer in zip(states.hidden, MAPPED, strict=True):
            assert (own - expected.hidden[layer + 1]).abs()[real].max() <= 1e-5
        got = states.logits[real] if kind == "spans" else states.logits
        assert (got - (expected.logits[real] if kind == "spans" else expected.logits)).abs().max() <= 1e-5
        other = plain.states(as_batch(*batch), MAPPED)
        assert (other.hidden[-1] - expected.hidden[-1]).abs()[real].max() > 1e-4


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", SPECS)
def test_every_term_is_the_published_one(teachers, kind, temperature):
    teacher, oracle_of_teacher, _ = teachers[kind]
    oracle, student = students(kind)
    ours = distiller(teacher, kind, temperature=temperature)
    assert ours.layers == MAPPED
    for batch in batches(kind, 3):
        with torch.no_grad():
            own, wanted = oracle(*batch[:3]), oracle_of_teacher(*batch[:3])
            loss = ours.task_loss(student, as_batch(*batch))
            text = ours.text_loss(student, as_batch(*batch))
        expected = {
            "hidden": hidden_loss(own, wanted, MAPPED),
            "attention": attention_loss(own, wanted, MAPPED),
            "prediction": prediction_loss(own, wanted, kind, batch[2], batch[3], temperature),
        }
        for name, value in expected.items():
            assert getattr(loss, name).item() == pytest.approx(value.item(), abs=1e-6, rel=1e-6), name
        assert loss.total.item() == pytest.approx(sum(expected.values()).item(), abs=1e-6, rel=1e-6)
        assert text.total.item() == pytest.approx((expected["hidden"] + expected["attention"]).item(), rel=1e-6)


def test_scores_up_to_minus_a_hundred_count_as_nothing(teachers):
    """Queries so large that real scores reach -100 are forgotten on both sides, as padding is."""
    teacher, oracle_of_teacher, _ = teachers["classification"]
    oracle, _ = students("classification")
    with torch.no_grad():
        for layer in oracle.encoder:
            layer.attention.query.weight.mul_(10000)
        batch = batches("classification", 1)[0]
        own, wanted = oracle(*batch[:3]), oracle_of_teacher(*batch[:3])
        real = (batch[2] == 0)[:, None, None].expand_as(own.scores[0])
        assert (own.scores[-1][real] <= -100).any()
        student = from_published(oracle.state_dict(), ARCHITECTURE).model
        loss = distiller(teacher, "classification").text_loss(student, as_batch(*batch))
    # scores of a hundred and more: float32 has seven digits, and a real score may fall on the other side of -100
    assert loss.attention.item() == pytest.approx(attention_loss(own, wanted, MAPPED).item(), rel=1e-4)


@pytest.mark.parametrize("total", [1, 5, 9, 10, 19, 20, 30, 257])
def test_learning_rates_are_the_published_ones(total):
    model = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(model, lr=1.0)
    warm = warmup_steps(0.1, total, published=True)
    scheduler = linear_schedule(optimizer, warm, total, published=True)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(published_rates(total), abs=1e-12)
    assert (rates[0] == 0) == (total >= 10)
    assert optimizer.param_groups[0]["lr"] == 0


def changed(before, after):
    return max((after[name] - value).abs().max().item() for name, value in before.items())


LEARNING_RATE, TOTAL = 1e-4, 20
"""Two of the five steps warm up, the first of them at a rate of 0."""


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("way", ["phase", "population"])
def test_five_steps_are_the_published_ones(teachers, kind, way):
    """Every weight after five optimizer steps, to 1e-6, at the published learning rate.

    But the bias of the spans' head: it moves all scores of a side alike, so its gradient is 0 but for float32's noise,
    which AdamW, dividing by the gradient's size, makes steps of.
    """
    teacher, oracle_of_teacher, _ = teachers[kind]
    oracle, student = students(kind)
    before = {name: value.clone() for name, value in oracle.state_dict().items()}
    data = batches(kind)

    def published(model, batch):
        own = model(*batch[:3])
        with torch.no_grad():
            wanted = oracle_of_teacher(*batch[:3])
        hidden = hidden_loss(own, wanted, MAPPED) + attention_loss(own, wanted, MAPPED)
        return hidden + prediction_loss(own, wanted, kind, batch[2], batch[3])

    ours = distiller(teacher, kind)
    settings = PhaseSettings(steps=TOTAL, batch_size=3, lr=LEARNING_RATE)
    stream = [as_batch(*batch) for batch in data]
    if way == "phase":

        class Enough(Exception):
            pass

        def after(done):
            if done == len(data):
                raise Enough

        with pytest.raises(Enough):
            run_phase(
                "steps",
                student,
                lambda start: iter(stream * TOTAL),
                lambda batch, _: ours.task_loss(student, batch),
                settings,
                TOTAL,
                weights=ours.weights,
                after_step=after,
            )
    else:
        settings = PhaseSettings(steps=len(data), batch_size=3, lr=LEARNING_RATE, warmup_ratio=0.4)
        member = Member(student, generator_state(torch.device("cpu")))
        train_population("steps", [member], iter(stream), ours, settings, len(data), "task")
    rates = published_rates(TOTAL) if way == "phase" else published_rates(len(data), 0.4)
    train(oracle, data, published, LEARNING_RATE, rates)
    options = {"problem_type": "regression"} if kind == "regression" else {}
    trained = from_published(oracle.state_dict(), ARCHITECTURE, **options).model
    assert changed(before, oracle.state_dict()) > LEARNING_RATE
    own, wanted = student.state_dict(), trained.state_dict()
    for name, value in wanted.items():
        allowed = len(data) * LEARNING_RATE if name == "qa_outputs.bias" else 1e-6
        assert (own[name] - value).abs().max() <= allowed, name


def test_layer_maps_agree_for_the_paper_s_depths():
    assert layer_map(6, 12) == MAPPED
    assert layer_map(12, 12) == list(range(12))
    assert isinstance(ARCHITECTURE, Architecture)
