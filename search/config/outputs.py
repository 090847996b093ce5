"""Configuration of what a run hands over beside its model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReportConfig:
    """What report and model card show.

    Args:
        samples: some texts of dev with the found model's answers, right and wrong; false for data that must not leave
            the house.
    """

    samples: bool = True
