"""One encoder with a head per task, for supernets distilled over several tasks.

Every task sees an ordinary model of its own whose encoder (pooler and distillation projection included) is the shared
one; a step of one task leaves the other heads as they are.

Rejected: one classifier as wide as all tasks together, cut by task. Regression, spans and choices need other heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from engine.student.modeling import FFNASPreTrainedModel


class MultiTaskStudent(nn.Module):
    """Heads around the encoder of one model.

    Args:
        main: whose encoder is shared; the model of task `name`.
        name: of the main task.
        others: a model for each other task; their own encoders are given up for main's.
    """

    def __init__(self, main: FFNASPreTrainedModel, name: str, others: Mapping[str, FFNASPreTrainedModel]) -> None:
        super().__init__()
        self.main = main
        self.heads = nn.ModuleDict()
        self._views = {name: main}
        prefix = main.base_model_prefix
        for task, model in others.items():
            setattr(model, prefix, main.base_model)
            self.heads[task] = nn.ModuleDict({n: m for n, m in model.named_children() if n != prefix})
            self._views[task] = model

    def of(self, task: str) -> FFNASPreTrainedModel:
        """The model of a task; it shares all its parameters with this one."""
        return self._views[task]
