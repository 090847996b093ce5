"""The verdict in words: one sentence for terminal, summary.json, report and model card, and what to try if it is bad.

found: accuracy 0.792 on dev (4,000 rows): better than bag of words (+5.1 points, 95 % interval +3.9 to +6.3),
level with the hand-designed GELU student (+0.2, -0.6 to +1.0), 0.9 below its teacher (-1.6 to -0.2).
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.task import NEG_LOG_LOSS
from search.evidence.baselines import BAG_OF_WORDS, MAJORITY
from search.evidence.compare import CONFIDENCE, Difference, Score

FEW_ROWS = 200
TEACHER = "teacher"
_TITLES = {BAG_OF_WORDS: "bag of words", MAJORITY: "a constant answer", TEACHER: "its teacher"}


def sentence(
    metric: str,
    found: Score,
    differences: Sequence[Difference],
    rows: int,
    *,
    titles: dict[str, str] | None = None,
    split: str = "dev",
) -> str:
    """What the comparison says, in one sentence.

    Args:
        metric: name of the primary metric.
        found: the found model's score.
        differences: found minus each other model, in the order they are told; that to `majority` only where found is
            not better.
        rows: of the split.
        titles: what to call a model, by name.
        split: where all of it was measured.
    """
    parts: list[str] = []
    told = [d for d in differences if d.name != MAJORITY or d.words != "better than"]
    for difference in told:
        parts.append(_part(difference, metric, title(difference.name, titles), first=not parts))
    start = f"{title(found.name, titles)}: {metric} {found.value:.3f} on {split} ({rows:,} rows)"
    return f"{start}: {', '.join(parts)}." if parts else f"{start}."


def title(name: str, titles: dict[str, str] | None = None) -> str:
    """What a model is called in sentences."""
    return {**_TITLES, **(titles or {})}.get(name, name)


def signed(value: float, metric: str) -> str:
    """A difference for people: in points (hundredths) with one decimal; log-likelihoods as they are."""
    return f"{value:+.3f}" if metric == NEG_LOG_LOSS else f"{_zero(100 * value, 1):+.1f}"


def _part(difference: Difference, metric: str, name: str, *, first: bool) -> str:
    unit = "" if metric == NEG_LOG_LOSS or not first else " points"
    interval = f"{signed(difference.low, metric)} to {signed(difference.high, metric)}"
    if first:
        interval = f"{CONFIDENCE:.0%} interval {interval}".replace("%", " %")
    if difference.name == TEACHER and difference.words != "level with":
        where = "above" if difference.words == "better than" else "below"
        return f"{signed(difference.value, metric)[1:]}{unit} {where} {name} ({interval})"
    return f"{difference.words} {name} ({signed(difference.value, metric)}{unit}, {interval})"


def _zero(value: float, digits: int) -> float:
    """`value` rounded, without the sign of a zero."""
    return round(value, digits) + 0.0


def advice(
    differences: Sequence[Difference],
    rows: int,
    *,
    teacher_over_words: Difference | None = None,
    titles: dict[str, str] | None = None,
) -> list[str]:
    """What to try where the found model is not clearly worth shipping, one line each; none where it is.

    Args:
        differences: found minus each other model.
        rows: of dev.
        teacher_over_words: teacher minus bag of words, where both were measured.
        titles: what to call a model, by name.
    """
    lines: list[str] = []
    by_name = {d.name: d for d in differences}
    words, constant = by_name.get(BAG_OF_WORDS), by_name.get(MAJORITY)
    if constant is not None and constant.words != "better than":
        lines.append(
            "it has learned nothing that pays: check labels and columns, then distil longer"
            " (--inherit.steps, --derive.task.steps)"
        )
    if teacher_over_words is not None and teacher_over_words.words != "better than":
        lines.append(
            f"its teacher is {teacher_over_words.words} bag of words: look at the teacher first"
            " (another --teacher, longer --finetune), or ship the bag of words"
        )
    elif words is not None and words.words != "better than":
        lines.append(
            f"{words.words} bag of words, which costs next to nothing: distil longer"
            " (--inherit.steps, --derive.task.steps), raise the budget (--budget.encoder, --budget.params),"
            " give more rows, or ship the bag of words"
        )
    for difference in differences:
        if difference.words == "worse than" and difference.name not in (BAG_OF_WORDS, MAJORITY, TEACHER):
            lines.append(
                f"worse than {title(difference.name, titles)}: try more candidates or more derive steps,"
                " or another --seed"
            )
    if rows < FEW_ROWS:
        lines.append(f"dev has only {rows:,} rows: such intervals are rough, give more rows (--data.dev)")
    return lines
