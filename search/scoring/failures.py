"""Failures by reason: what differs in numbers alone is one reason.

Rejected: reason codes given where a candidate fails. Reasons come from several layers, one of them PyTorch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<![A-Za-z_])[-+]?\d[\d.]*(?:e[-+]?\d+)?")


def kind(reason: str | None) -> str:
    """A reason with # for every number in it; `unknown` where there is none."""
    return _NUMBER.sub("#", reason or "unknown")


def by_reason(reasons: Iterable[str | None]) -> Counter[str]:
    """How often each kind of reason occurs."""
    return Counter(kind(reason) for reason in reasons)
