"""Teachers: found, loaded, watched, fine-tuned on the task and cached.

Names are resolved on first use (PEP 562), so that a configuration can hold `FinetuneSettings` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "FinetuneSettings": "engine.teacher.settings",
    "Teacher": "engine.teacher.adapter",
    "TeacherSource": "engine.model_sources",
    "resolve": "engine.model_sources",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'engine.teacher' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
