"""What the sentinel takes for a defect: differences beyond its limits that rounding to bf16 does not explain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.autocast import autocast
from engine.objective import KDLoss
from engine.training import sentinel
from engine.training.sentinel import Sentinel
from kernels.dispatch import preferred_backend

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    preferred_backend("cpu") == "reference", reason="no compiler, no kernels: nothing to compare the reference with"
)


@pytest.fixture
def retired(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends taken out of service, which they are not in truth."""
    names: list[str] = []
    monkeypatch.setattr(sentinel, "retire", lambda name, _: names.append(name))
    return names


@pytest.fixture
def notes() -> list[str]:
    return []


def answers(own_error: float, rounding: float, runs: list[str]):
    """Logits that are `own_error` off on kernels and `rounding` off on the bf16 reference, relative to fp32's."""
    exact = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    away = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    away *= exact.norm() / away.norm()

    def logits() -> Tensor:
        with autocast(CPU, "bf16"):
            bf16 = torch.is_autocast_enabled("cpu")
        own = preferred_backend("cpu") != "reference"
        runs.append("own" if own else "bf16" if bf16 else "fp32")
        return exact + away * (own_error if own else -rounding if bf16 else 0.0)

    return logits


@pytest.mark.parametrize(
    ("precision", "own_error", "rounding", "agrees", "runs"),
    [
        ("bf16", 0.01, 0.01, True, ["own", "bf16"]),  # within the limit
        ("bf16", 0.06, 0.05, True, ["own", "bf16", "fp32"]),  # above it, no worse than rounding
        ("bf16", 0.06, 0.02, False, ["own", "bf16", "fp32"]),  # above it, three times what rounding does
        ("bf16", 1.0, 0.05, False, ["own", "bf16", "fp32"]),
        ("fp32", 0.01, 0.0, False, ["own", "bf16"]),  # nothing to excuse
        ("fp32", 1e-5, 0.0, True, ["own", "bf16"]),
    ],
)
def test_rounding_is_no_defect(
    precision: str,
    own_error: float,
    rounding: float,
    agrees: bool,
    runs: list[str],
    retired: list[str],
    notes: list[str],
) -> None:
    asked: list[str] = []
    same = Sentinel(CPU, precision, notes.append).scoring("stage3", answers(own_error, rounding, asked))
    assert same is agrees
    assert asked == runs
    assert bool(retired) is not agrees
    assert len(notes) == (not agrees)
    assert all("stage3: logits differs by" in n for n in notes)


def test_short_phases_are_compared_once_of_a_kind(retired: list[str], notes: list[str]) -> None:
    model, asked = nn.Linear(3, 1), []
    x = torch.ones(2, 3)

    def loss() -> KDLoss:
        asked.append(preferred_backend("cpu"))
        value = model(x).square().mean()
        return KDLoss.of(value, hidden=value)

    def comparisons(watch: Sentinel, **phase: object) -> int:
        asked.clear()
        assert watch.training("derive", model, loss, **phase)
        assert asked in ([], ["cpu", "reference"])
        return len(asked) // 2

    watch = Sentinel(CPU, "fp32", notes.append)
    assert comparisons(watch, kind="text", steps=19) == 1
    assert comparisons(watch, kind="text", steps=19) == 0
    assert comparisons(watch, kind="task", steps=3) == 1
    assert comparisons(watch, kind="task", steps=20) == 1
    assert comparisons(watch, kind="task", steps=1) == 0
    assert comparisons(watch) == 1
    assert comparisons(watch) == 1  # whoever does not say how long a phase is
    assert comparisons(Sentinel(CPU, "fp32", notes.append), kind="text", steps=19) == 1
    assert notes == retired == []


def test_what_is_not_finite_is_a_defect_in_bf16(retired: list[str], notes: list[str]) -> None:
    def logits() -> Tensor:
        return torch.full((3,), torch.nan if preferred_backend("cpu") != "reference" else 1.0)

    assert not Sentinel(CPU, "bf16", notes.append).scoring("derive", logits)
    assert "cpu" in retired
    assert "allowed is 0" in notes[0]
