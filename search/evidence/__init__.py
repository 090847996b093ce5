"""Evidence: is the found model worth shipping? Baselines, comparisons with intervals, sizes, speed, a verdict."""

from __future__ import annotations

from search.evidence.answers import Answers, read_predictions, write_predictions
from search.evidence.baselines import bag_of_words, majority
from search.evidence.compare import Comparison, Difference, Score, compare
from search.evidence.gather import Subject, gather, gather_run
from search.evidence.speed import measure_speed, parameters
from search.evidence.verdict import advice, sentence

__all__ = [
    "Answers",
    "Comparison",
    "Difference",
    "Score",
    "Subject",
    "advice",
    "bag_of_words",
    "compare",
    "gather",
    "gather_run",
    "majority",
    "measure_speed",
    "parameters",
    "read_predictions",
    "sentence",
    "write_predictions",
]
