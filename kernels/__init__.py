"""ffnas kernels: the expression language of FFN bodies, their fused ops, and knowledge-distillation losses.

Importing this package is light: it never imports `torch` or `transformers`, touches no device and never raises.
Public names are resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "BackendFallbackWarning": "kernels.dispatch",
    "Expression": "kernels.expression",
    "ExpressionError": "kernels.expression",
    "FusedFFN": "kernels.modules",
    "FusedFFNStack": "kernels.modules",
    "Program": "kernels.program",
    "attention_score_mse": "kernels.losses",
    "attention_score_mse_layers": "kernels.losses",
    "available_backends": "kernels.dispatch",
    "disassemble": "kernels.disassembly",
    "fused_attention": "kernels.attention",
    "GroupMember": "kernels.grouped",
    "KronLinear": "kernels.modules",
    "KronWeight": "kernels.kron",
    "fused_ffn": "kernels.ops",
    "fused_ffn_grouped": "kernels.grouped",
    "fused_ffn_stack": "kernels.ops",
    "load_program": "kernels.lowering",
    "nearest_kron": "kernels.kron",
    "hidden_mse": "kernels.losses",
    "hidden_mse_layers": "kernels.losses",
    "lower": "kernels.lowering",
    "parse_expression": "kernels.expression",
    "parse_layers": "kernels.expression",
    "replace_ffn": "kernels.replace",
    "soft_cross_entropy": "kernels.losses",
    "use_backend": "kernels.dispatch",
    "validate_program": "kernels.validation",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
