"""Student and supernet models: transformers models whose FFNs are expressions and whose subnets are weight views.

Names are resolved on first use (PEP 562): transformers' AutoConfig needs the configuration at a time when its model
classes cannot be imported yet (see `engine.registration`).
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FFNASConfig": "engine.student.configuration",
    "FFNASForMaskedLM": "engine.student.heads",
    "FFNASForMultipleChoice": "engine.student.heads",
    "FFNASForQuestionAnswering": "engine.student.heads",
    "FFNASForSequenceClassification": "engine.student.heads",
    "FFNASForTokenClassification": "engine.student.token_head",
    "FFNASModel": "engine.student.modeling",
    "FFNASPreTrainedModel": "engine.student.modeling",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'engine.student' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
