"""The objective against a literal computation of the paper's formulas on materialized scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.data.task import head_of
from engine.errors import UserError
from engine.objective import KDWeights, kd_loss, layer_map
from engine.states import EncoderStates

B, S, H, HT, HEADS, L, C = 3, 7, 10, 6, 2, 2, 3


def make_states(hidden, seed, *, layers=L, heads=HEADS, grad=False, logits=C):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)

    return EncoderStates(
        embeddings=draw(B, S, hidden),
        hidden=tuple(draw(B, S, hidden) for _ in range(layers)),
        queries=tuple(draw(B, heads, S, hidden // heads) for _ in range(layers)),
        keys=tuple(draw(B, heads, S, hidden // heads) for _ in range(layers)),
        logits=None if logits is None else draw(B, logits),
    )


@pytest.fixture
def setting():
    torch.manual_seed(0)
    mask = torch.arange(S)[None] < torch.tensor([7, 4, 1])[:, None]
    return make_states(H, 1, grad=True), make_states(HT, 2), mask, nn.Linear(H, HT).double()


def literal_terms(student, teacher, mask, fit, temperature):
    tokens = mask.sum()
    hidden = sum(
        (fit(a) - b)[mask].square().sum() / (tokens * HT)
        for a, b in zip((student.embeddings, *student.hidden), (teacher.embeddings, *teacher.hidden), strict=True)
    )
    pair = (mask[:, :, None] & mask[:, None, :])[:, None].expand(-1, HEADS, -1, -1)
    attention = sum(
        (student.queries[i] @ student.keys[i].mT - teacher.queries[i] @ teacher.keys[i].mT)[pair].square().mean()
        for i in range(L)
    )
    p_t = (teacher.logits / temperature).softmax(-1)
    prediction = F.cross_entropy(student.logits / temperature, p_t) * temperature**2
    return hidden, attention, prediction


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_terms_total_and_gradients_equal_the_formulas(setting, temperature):
    student, teacher, mask, fit = setting
    weights = KDWeights(hidden=0.5, attention=2.0, prediction=3.0, temperature=temperature)
    loss = kd_loss(student, teacher, mask, fit_dense=fit, weights=weights)
    expected = literal_terms(student, teacher, mask, fit, temperature)
    for got, value in zip((loss.hidden, loss.attention, loss.prediction), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=0)  # float64, another order of summation
    total = 0.5 * expected[0] + 2.0 * expected[1] + 3.0 * expected[2]
    torch.testing.assert_close(loss.total, total, rtol=1e-12, atol=0)
    inputs = [student.embeddings, *student.hidden, *student.queries, *student.keys, student.logits, *fit.parameters()]
    for got, value in zip(torch.autograd.grad(loss.total, inputs), torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-14)


def test_terms_left_out_or_of_weight_zero_are_zero_and_need_nothing(setting):
    student, teacher, mask, fit = setting
    no_head = EncoderStates(student.embeddings, student.hidden, student.queries, student.keys)
    both = kd_loss(no_head, teacher, mask, fit_dense=fit, weights=KDWeights(), terms=("hidden", "attention"))
    assert both.prediction.item() == 0.0
    torch.testing.assert_close(both.total, both.hidden + both.attention)
    one = kd_loss(no_head, teacher, mask, fit_dense=fit, weights=KDWeights(attention=0, prediction=0))
    assert one.attention.item() == 0.0
    torch.testing.assert_close(one.total, one.hidden)


def test_regression_predicts_the_gold_labels(setting):
    student, teacher, mask, fit = setting
    student = EncoderStates(student.embeddings, student.hidden, student.queries, student.keys, torch.randn(B, 1))
    labels, head = torch.tensor([0.5, 4.0, 2.5]), head_of("regression")
    loss = kd_loss(student, teacher, mask, fit_dense=fit, weights=KDWeights(), labels=labels, head=head)
    torch.testing.assert_close(loss.prediction, (student.logits[:, 0] - labels).square().mean())
    with pytest.raises(UserError, match="needs labels"):
        kd_loss(student, teacher, mask, fit_dense=fit, weights=KDWeights(), head=head)


def test_paper_exact_counts_padding_and_averages_over_classes(setting):
    student, teacher, mask, fit = setting
    loss = kd_loss(student, teacher, mask, fit_dense=fit, weights=KDWeights(paper_exact=True, temperature=2.0))
    hidden = sum(
        (fit(a) - b).square().mean()
        for a, b in zip((student.embeddings, *student.hidden), (teacher.embeddings, *teacher.hidden), strict=True)
    )
    seen = mask[:, None, None, :]
    attention = sum(
        ((student.queries[i] @ student.keys[i].mT - teacher.queries[i] @ teacher.keys[i].mT) * seen).square().mean()
        for i in range(L)
    )
    prediction = F.cross_entropy(student.logits / 2, (teacher.logits / 2).softmax(-1)) / C
    for got, value in zip((loss.hidden, loss.attention, loss.prediction), (hidden, attention, prediction), strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=0)  # that path is fp32, as published
    torch.testing.assert_close(loss.total, loss.hidden + loss.attention + loss.prediction)


def test_equal_widths_need_no_projection(setting):
    student, _, mask, _ = setting
    loss = kd_loss(student, student, mask, fit_dense=None, weights=KDWeights(prediction=0))
    assert loss.total.item() == 0.0


def test_bf16_states_outside_autocast(setting):
    student, teacher, mask, fit = setting
    low = EncoderStates(
        student.embeddings.bfloat16(),
        tuple(x.bfloat16() for x in student.hidden),
        tuple(x.bfloat16() for x in student.queries),
        tuple(x.bfloat16() for x in student.keys),
        student.logits.bfloat16(),
    )
    loss = kd_loss(low, teacher, mask, fit_dense=fit.float(), weights=KDWeights())
    # bf16 keeps 8 bits; the terms are means over dozens of values
    expected = literal_terms(student, teacher, mask, fit.double(), 1.0)
    for got, value in zip((loss.hidden, loss.attention, loss.prediction), expected, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"teacher": make_states(HT, 2, layers=3)}, ["2 layers", "of 3"]),
        ({"teacher": make_states(HT, 2, heads=3)}, ["student has 2", "teacher 3"]),
        ({"teacher": make_states(HT, 2, logits=None)}, ["teacher gave no logits"]),
        ({"teacher": make_states(HT, 2, logits=4)}, ["(3, 3)", "(3, 4)"]),
        ({"fit_dense": None}, ["10 wide", "6"]),
        ({"student": make_states(H, 1, logits=None)}, ["no task head"]),
    ],
    ids=["layers", "heads", "no-logits", "classes", "width", "no-head"],
)
def test_what_cannot_be_compared_is_named(setting, change, words):
    student, teacher, mask, fit = setting
    arguments = {"student": student, "teacher": teacher, "mask": mask, "fit_dense": fit, "weights": KDWeights()}
    with pytest.raises(UserError) as error:
        kd_loss(**{**arguments, **change})
    assert all(word in str(error.value) for word in words)


def test_unknown_terms_and_bad_weights():
    states = make_states(H, 1)
    with pytest.raises(ValueError, match="unknown terms"):
        kd_loss(states, states, torch.ones(B, S, dtype=torch.bool), fit_dense=None, weights=KDWeights(), terms=("x",))
    with pytest.raises(UserError, match="attention weight"):
        KDWeights(attention=-1)
    with pytest.raises(UserError, match="temperature"):
        KDWeights(temperature=0)


@pytest.mark.parametrize("num_student", range(1, 13))
@pytest.mark.parametrize("num_teacher", [1, 3, 6, 7, 12, 24])
def test_layer_map_is_the_papers_formula_and_always_defined(num_student, num_teacher):
    if num_teacher < num_student:
        with pytest.raises(UserError, match=rf"{num_student} layers, the teacher only {num_teacher}"):
            layer_map(num_student, num_teacher)
        return
    mapped = layer_map(num_student, num_teacher)
    assert len(mapped) == num_student
    assert mapped == sorted(set(mapped))
    assert mapped[0] >= 0
    assert mapped[-1] == num_teacher - 1
    if num_teacher % num_student == 0:
        step = num_teacher // num_student
        assert mapped == [(layer + 1) * step - 1 for layer in range(num_student)]


def test_layer_map_examples():
    assert layer_map(6, 12) == [1, 3, 5, 7, 9, 11]
    assert layer_map(4, 6) == [1, 2, 4, 5]
