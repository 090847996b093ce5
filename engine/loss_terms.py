"""The terms of the distillation loss, as everybody but their arithmetic needs them; loads no framework.

To add one: a row here; its function, a weight in `KDWeights` and a field in `KDLoss` (`engine.objective`); the option
for its weight (`search.config.distillation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Term:
    """One term.

    Attributes:
        name: also of its weight, of its column in logs, and in plots.
        unit: what it is a mean over, which decides how parts of a batch are weighed (`engine.data.parts.Part`).
        on_text: whether it is compared on plain text, too.
        color: of its curve.
    """

    name: str
    unit: Literal["tokens", "pairs", "rows"]
    on_text: bool
    color: str


TERMS = (
    Term("hidden", "tokens", on_text=True, color="#0072B2"),
    Term("attention", "pairs", on_text=True, color="#E69F00"),
    Term("prediction", "rows", on_text=False, color="#009E73"),
)
TASK_TERMS = tuple(term.name for term in TERMS)
"""Compared on a batch of the task."""
TEXT_TERMS = tuple(term.name for term in TERMS if term.on_text)
"""Compared on a batch of plain text."""
LOGGED = ("total", *TASK_TERMS)
"""Names of a `KDLoss`, in order."""
