"""The optimizer's groups and arithmetic, and the schedule, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.training.optim import build_optimizer, linear_schedule


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 7))
    model[3].weight = nn.Parameter(torch.randn(7, 3))
    return model


def test_decays_matrices_only_and_takes_shared_and_frozen_parameters_rightly():
    model = make_model()
    model.again = model[1]  # a second name for the same parameters
    model[3].bias.requires_grad_(False)
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.1)
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    assert groups[0.1] == {id(model[0].weight), id(model[1].weight), id(model[3].weight)}
    assert groups[0.0] == {id(model[1].bias), id(model[2].weight), id(model[2].bias)}
    assert optimizer.defaults["fused"]


def test_steps_equal_adamw_by_hand():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    bias = nn.Parameter(torch.randn(3, dtype=torch.float64))
    optimizer = build_optimizer([("w", weight), ("b", bias)], lr=0.01, weight_decay=0.1)
    state = {id(p): (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for p in (weight, bias)}
    for step in range(1, 5):
        (weight.square().sum() + (bias * step).sum()).backward()
        for p, decay in ((weight, 0.1), (bias, 0.0)):
            value, m, v = state[id(p)]
            m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
            value = value * (1 - 0.01 * decay)
            value = value - 0.01 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            state[id(p)] = (value, m, v)
        optimizer.step()
        optimizer.zero_grad()
        for p in (weight, bias):
            torch.testing.assert_close(p.detach(), state[id(p)][0], rtol=1e-12, atol=1e-14)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no parameter requires a gradient"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), lr=1e-3)


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 1), (0, 5), (3, 10), (10, 10)])
def test_schedule_rises_to_the_peak_and_falls_to_zero(warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = linear_schedule(optimizer, warmup, total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [2.0 * (k + 1) / (warmup + 1) for k in range(warmup)]
    expected += [2.0 * (total - k) / (total - warmup) for k in range(warmup, total)]
    assert rates == pytest.approx(expected)
    assert all(0 < rate <= 2.0 for rate in rates)  # no step is lost
    assert optimizer.param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize(("warmup", "total"), [(0, 0), (-1, 5), (6, 5)])
def test_impossible_schedules_are_refused(warmup, total):
    with pytest.raises(ValueError, match="warmup_steps"):
        linear_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), warmup, total)
