"""The table of loss terms and what goes with it name the same terms."""

from __future__ import annotations

from dataclasses import fields

import torch

from engine import objective
from engine.data.batching import Batch
from engine.data.parts import split
from engine.loss_terms import LOGGED, TASK_TERMS, TERMS, TEXT_TERMS
from engine.objective import KDLoss, KDWeights
from search.config.distillation import KDConfig
from search.report.theme import TERM_COLORS


def test_every_term_has_a_function_a_weight_an_option_a_place_and_a_colour_of_its_own():
    assert tuple(objective._FUNCTIONS) == TASK_TERMS
    assert tuple(field.name for field in fields(KDLoss)) == LOGGED
    for names in (vars(KDWeights()), vars(KDConfig()), TERM_COLORS):
        assert set(TASK_TERMS) <= set(names)
    assert len(set(TERM_COLORS.values())) == len(LOGGED) == len(TERMS) + 1
    assert set(TEXT_TERMS) < set(TASK_TERMS)


def test_every_unit_is_a_share_of_a_part():
    mask = torch.arange(5) < torch.tensor([5, 3, 2, 1])[:, None]
    parts = split(Batch(mask.long(), mask, mask.long()), micro_batches=2)
    for term in TERMS:
        assert sum(getattr(part, term.unit) for part in parts) == 1


def test_parts_that_are_not_given_are_zero():
    loss = KDLoss.of(torch.tensor(3.0), hidden=torch.tensor(2.0))
    given = {"total": 3.0, "hidden": 2.0}
    assert {name: getattr(loss, name).item() for name in LOGGED} == dict.fromkeys(LOGGED, 0.0) | given
