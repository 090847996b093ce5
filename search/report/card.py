"""The architecture's drawing as it stands in a model card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.architecture.params import count_parameters
from search.report.drawing import draw_architecture
from search.report.theme import style

if TYPE_CHECKING:
    from engine.student.configuration import FFNASConfig


def architecture_png(
    config: FFNASConfig,
    *,
    teacher: str | None = None,
    teacher_layers: int | None = None,
    layer_map: Sequence[int] | None = None,
) -> bytes:
    """PNG of the architecture `config` stores; beside its teacher where that is given (see `draw_architecture`)."""
    architecture = config.full_architecture
    with style():
        made = draw_architecture(
            architecture,
            hidden_size=config.hidden_size,
            params=count_parameters(architecture, config.shape, fit_dense=False),
            teacher=teacher,
            teacher_layers=teacher_layers,
            layer_map=layer_map,
        )
        buffer = io.BytesIO()
        made.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
