"""Settings of `ffnas derive` that nobody named: steps, batches and learning rates by the size of the data.

A derivation trains one student, most often from fresh weights, on somebody's own data and processor. So the task is
passed over several times, in at least 300 steps and at most 2,000, within a bound on tokens that keeps long texts from
taking many times as long as short ones. Text the user has is passed over up to three times before, in no more steps
than the task gets.

Rejected: the authors' recipe as the default (`--settings paper`). Ten passes over Wikipedia and BooksCorpus take GPUs
weeks and the hub gigabytes, which nobody asks for who names two files.
"""

from __future__ import annotations

import math

from engine.data.rows import Rows
from engine.data.task_data import TaskData

BATCH, FEW_BATCH, FEW_ROWS = 32, 16, 1_000
"""Sequences per step, and those of tasks with fewer rows, which would else be passed over in a handful of steps."""
PASSES, LEAST_STEPS, MOST_STEPS = 5, 300, 2_000
"""Passes over the task and bounds on their steps."""
MOST_TOKENS = 600_000
"""Most tokens of the task phase; the least steps are taken in any case."""
TEXT_PASSES = 3
FRESH_LR, FRESH_WIDTH = 1e-3, 384
"""Learning rate of fresh weights up to this hidden size; falls as 1/width above."""
GIVEN_LR = 3e-4
"""Learning rate of weights that are given: that of students made of a teacher's layers."""
TOKENS_PER_WORD = 1.3
_MEASURED = 2_000


def by_size(task: TaskData, *, max_length: int, hidden_size: int, fresh: bool, own_text: bool) -> list[str]:
    """Options of `ffnas search` for the phases `derive.text` and `derive.task`.

    Args:
        task: the data.
        max_length: tokens to which texts are cut.
        hidden_size: of the student.
        fresh: whether the student starts from fresh weights.
        own_text: whether the user gave text; without it there is no phase on text.
    """
    rows = len(task.train)
    batch = BATCH if rows >= FEW_ROWS else FEW_BATCH
    row_tokens = mean_tokens(task.train, max_length) * len(task.spec.head.sequences(task.train.texts))
    steps = min(MOST_STEPS, max(LEAST_STEPS, math.ceil(PASSES * rows / batch)))
    steps = max(LEAST_STEPS, min(steps, int(MOST_TOKENS / (batch * row_tokens))))
    rate = FRESH_LR * min(1.0, FRESH_WIDTH / hidden_size) if fresh else GIVEN_LR
    text = 0
    if own_text:
        text = steps
        if not task.prepared:
            sequences = sum(len(document.split()) for document in task.text) * TOKENS_PER_WORD / max_length
            text = min(steps, max(1, math.ceil(TEXT_PASSES * sequences / BATCH)))
    values = {
        "text.steps": text,
        "text.batch_size": BATCH,
        "text.lr": rate,
        "task.steps": steps,
        "task.batch_size": batch,
        "task.lr": rate,
    }
    return [word for name, value in values.items() for word in (f"--derive.{name}", str(value))]


def mean_tokens(rows: Rows, max_length: int) -> float:
    """Tokens of a row on average, about: by the words of some thousand rows spread evenly, cut at `max_length`."""
    some = range(0, len(rows), max(1, len(rows) // _MEASURED))
    words = [sum(len(column[k].split()) for column in rows.texts) for k in some]
    lengths = [min(max_length, TOKENS_PER_WORD * count + 2) for count in words]
    return sum(lengths) / max(1, len(lengths))
