"""Small encoders without PyTorch: a folder in, answers out.

    from kernels.runtime import Session

    classify = Session("model-native")          # written by `ffnas export RUN --native model-native`
    classify(["the battery lasts two days"])    # [{"label": "positive", "score": 0.98}]

Needs numpy, and tokenizers for texts; the compute is one call into csrc/cpu per batch. Imports within this folder are
relative: it is also a package of its own, `ffnas_runtime` (`kernels.runtime.wheel`).
"""

from __future__ import annotations

from .description import NativeError
from .session import Session

__all__ = ["NativeError", "Session"]
