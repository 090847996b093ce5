"""Structural distillation of every pair of heads, against sums over all tag sequences in float64."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from engine.student.chain import best_tags, packed, unpacked
from engine.tasks.structure import divergences, gold_loss, paper_loss, structural_loss

TAGS, TOKENS = 3, 7
PLACES = torch.tensor(
    [[0, 1, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 0, 1]]
).bool()
HEADS = pytest.mark.parametrize("heads", ["crf crf", "crf softmax", "softmax crf", "softmax softmax"])


def answer(head, seed, *, grad=False, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    emissions, transitions = draw(len(PLACES), TOKENS, TAGS), (draw(TAGS, TAGS), draw(TAGS), draw(TAGS))
    leaves = [t.requires_grad_(grad) for t in (emissions, *(transitions if head == "crf" else ()))]
    return (packed(emissions, transitions) if head == "crf" else emissions), leaves


def distribution(given, b, temperature=1.0):
    """Every tag sequence of the words of b, with its log-probability."""
    rows, below = given[b, :TOKENS][PLACES[b]], given[b, TOKENS:]
    logs, every = [], list(product(range(TAGS), repeat=len(rows)))
    for y in every:
        total = sum((rows[k, tag] for k, tag in enumerate(y)), given.new_zeros(()))
        if len(below) and y:
            total = total + sum(below[i, j] for i, j in pairwise(y)) + below[-2, y[0]] + below[-1, y[-1]]
        logs.append(total / temperature)
    return every, torch.log_softmax(torch.stack(logs), 0)


def enumerated(student, teacher, temperature, tags_alone):
    """KL(teacher || student) of whole sequences; with `tags_alone` the sum over words of KL of single tags."""
    total = []
    for b in range(len(PLACES)):
        every, log_t = distribution(teacher, b, temperature)
        _, log_s = distribution(student, b, temperature)
        value = (log_t.exp() * (log_t - log_s)).sum()
        if tags_alone:
            value = student.new_zeros(())
            for k in range(int(PLACES[b].sum())):
                single = [
                    torch.stack(
                        [sum(p for y, p in zip(every, log.exp(), strict=True) if y[k] == tag) for tag in range(TAGS)]
                    )
                    for log in (log_t, log_s)
                ]
                value = value + (single[0] * (single[0].log() - single[1].log())).sum()
        total.append(value)
    return torch.stack(total)


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_and_gradients_equal_sums_over_all_sequences(heads, temperature):
    of, own = heads.split()
    teacher, _ = answer(of, 1)
    student, leaves = answer(own, 2, grad=True)
    found = divergences(student, teacher, PLACES, temperature)
    exact = enumerated(student, teacher, temperature, own == "softmax")
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    loss = structural_loss(student, teacher, PLACES, temperature)
    torch.testing.assert_close(loss.double(), temperature**2 * exact.sum() / PLACES.sum(), rtol=1e-6, atol=0)
    whole = enumerated(student, teacher, temperature, False)  # gradients are those of whole sequences for any head
    for gradient, expected in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(whole.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@HEADS
def test_losses_in_float32_are_never_negative(heads):
    of, own = heads.split()
    for seed in range(20):
        teacher = answer(of, seed, scale=4.0)[0].float()
        student = answer(own, seed if of == own else seed + 50, scale=4.0)[0].float()
        found = divergences(student, teacher, PLACES, 1.0)
        assert (found >= 0).all()
        if of == own:
            assert found.max() < 1e-5


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_gold_loss_and_best_tags_equal_sums_over_all_sequences(head):
    given, _ = answer(head, 3)
    labels = torch.full(PLACES.shape, -100)
    generator = torch.Generator().manual_seed(0)
    labels[PLACES] = torch.randint(0, TAGS, (int(PLACES.sum()),), generator=generator)
    total = 0.0
    best = best_tags(given, PLACES)
    for b in range(len(PLACES)):
        every, logs = distribution(given, b)
        total -= logs[every.index(tuple(labels[b][PLACES[b]].tolist()))]
        words = int(PLACES[b].sum())
        assert tuple(best[b, :words].tolist()) == every[int(logs.argmax())]
        assert (best[b, words:] == -1).all()
    torch.testing.assert_close(gold_loss(given, labels, PLACES).double(), total / PLACES.sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("head", ["crf", "softmax"])
def test_words_without_a_tag_do_not_count_in_the_gold_loss(head):
    given, _ = answer(head, 3)
    labels = torch.where(PLACES, 1, -100)
    alone = labels.clone()
    alone[0] = -100
    untagged = labels.clone()
    untagged[0, PLACES[0]] = -101
    places = PLACES.clone()
    places[0] = False
    expected = gold_loss(given, alone, places)
    torch.testing.assert_close(gold_loss(given, untagged, PLACES), expected)


@HEADS
def test_the_published_temperature_is_local(heads):
    """Cross-entropy under marginals of which every position was tempered by itself, at T = 1 the exact one."""
    of, own = heads.split()
    teacher, student = answer(of, 1)[0], answer(own, 2)[0]
    total = []
    for b in range(len(PLACES)):
        _, log_t = distribution(teacher, b)
        _, log_s = distribution(student, b)
        total.append(-(log_t.exp() * log_s).sum())
    torch.testing.assert_close(paper_loss(student, teacher, PLACES, 1.0).double(), torch.stack(total).mean())
    _every, log_t = distribution(teacher, 1)  # one word: temperature on its marginal is temperature on its scores
    tempered = (log_t / 3).softmax(0)
    _, log_s = distribution(student, 1)
    only = torch.zeros_like(PLACES)
    only[1] = PLACES[1]
    found = paper_loss(student, teacher, only, 3.0) * len(PLACES)
    torch.testing.assert_close(found.double(), -(tempered * log_s).sum())


def test_answers_to_another_number_of_tokens_are_no_chains():
    """5 rows of 3 tags: a softmax at 5 tokens, a CRF's at none; never a CRF's at 3."""
    answer = torch.zeros(2, 5, 3)
    assert unpacked(answer, 5)[1] is None
    assert unpacked(answer, 0)[1] is not None
    with pytest.raises(ValueError, match="none to 3 tokens"):
        unpacked(answer, 3)
