"""Small encoders without PyTorch: a folder in, answers out.

    from kernels.runtime import Session

    classify = Session("model-native")          # written by `ffnas export RUN --native model-native`
    classify(["the battery lasts two days"])    # [{"label": "positive", "score": 0.98}]

Needs numpy, and tokenizers for texts; the compute is one call into csrc/cpu per batch.
"""

from __future__ import annotations

from kernels.runtime.description import NativeError
from kernels.runtime.session import Session

__all__ = ["NativeError", "Session"]
