"""The best weights of a fine-tuning by the task's primary metric on `select`; and whether a head is good as it is.

Rejected: taking any head whose label names fit. "positive" and "negative" are names of many tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.data import EncodedTask
from engine.data.task import NEG_LOG_LOSS
from engine.evaluation.evaluation import evaluate
from engine.evaluation.metrics import primary
from engine.teacher.adapter import Teacher

POINTS, SHARE = 0.10, 0.5
"""A head is good enough that is better than the most frequent class by so much, or by this share of what is missing."""


class Best:
    """Evaluates a teacher on `select` and remembers its best weights.

    Args:
        teacher: trained by somebody else.
        data: its task.
        precision: of the evaluations, "fp32" or "bf16".

    Attributes:
        metrics: of the best evaluation.
        weights: of it; None: those in the model.
        without_gain: evaluations since then.
    """

    def __init__(self, teacher: Teacher, data: EncodedTask, precision: str) -> None:
        self.teacher, self.data, self.precision = teacher, data, precision
        self.metrics: dict[str, float] | None = None
        self.weights: dict[str, Tensor] | None = None
        self.without_gain = 0

    def update(self, *, last: bool) -> dict[str, float]:
        """Evaluate the model; remember its weights if they are the best."""
        metrics = self._evaluate()
        self.without_gain += 1
        if self.metrics is None or primary(self.data.spec, metrics)[1] > primary(self.data.spec, self.metrics)[1]:
            self.metrics, self.without_gain = metrics, 0
            state = self.teacher.model.state_dict()
            self.weights = None if last else {name: t.detach().cpu().clone() for name, t in state.items()}
        return metrics

    def knows_the_task(self) -> bool:
        """Whether the model as it is answers clearly better than the most frequent class; notes the answer.

        By a tenth, or half way to a perfect score, whichever is less. If so, its metrics are the teacher's.
        """
        spec, metrics = self.data.spec, self._evaluate()
        (name, value), constant = primary(spec, metrics), spec.head.constant_score(spec, self.data.select)
        if constant is None:
            return False
        perfect = 0.0 if name == NEG_LOG_LOSS else 1.0
        knows = value >= constant + min(POINTS, SHARE * (perfect - constant))
        scores = f"{name} {value:.3f} on select, {constant:.3f} by always answering the most frequent class"
        what = "is used as it is" if knows else "is fine-tuned further"
        self.teacher.notes.append(f"the head that came with the teacher {what}: {scores}")
        if knows:
            self.teacher.metrics = metrics
            self.teacher.model.eval()
        return knows

    def _evaluate(self) -> dict[str, float]:
        return evaluate(self.teacher.model, self.data.select, self.data.spec, precision=self.precision)

    def install(self) -> None:
        """Put the best weights into the model."""
        if self.weights is not None:
            self.teacher.model.load_state_dict(self.weights)
        self.teacher.metrics = dict(self.metrics or {})
        self.teacher.model.eval()

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        if self.metrics is None or self.weights is None:
            return {}
        values = {f"metric/{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.metrics.items()}
        weights = {f"weight/{name}": tensor for name, tensor in self.weights.items()}
        return {**values, **weights, "count/without_gain": torch.tensor(self.without_gain)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state`."""
        if state:
            self.metrics = {name: float(value) for name, value in _part(state, "metric/").items()}
            self.weights = _part(state, "weight/")
            self.without_gain = int(state["count/without_gain"])


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
