"""ffnas kernels: the expression language of FFN bodies, their fused ops, and knowledge-distillation losses.

Importing this package is light: it never imports `torch` or `transformers`, touches no device and never raises.
Public names are resolved on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "BackendFallbackWarning": "kernels.dispatch",
    "Expression": "kernels.language.expression",
    "ExpressionError": "kernels.language.expression",
    "FusedFFN": "kernels.ffn.modules",
    "FusedFFNStack": "kernels.ffn.modules",
    "Program": "kernels.language.program",
    "attention_score_mse": "kernels.losses.ops",
    "attention_score_mse_layers": "kernels.losses.ops",
    "available_backends": "kernels.dispatch",
    "disassemble": "kernels.language.disassembly",
    "fused_attention": "kernels.attention.ops",
    "GroupMember": "kernels.ffn.grouped",
    "KronLinear": "kernels.ffn.modules",
    "KronWeight": "kernels.ffn.kron",
    "fused_ffn": "kernels.ffn.ops",
    "fused_ffn_grouped": "kernels.ffn.grouped",
    "fused_ffn_stack": "kernels.ffn.ops",
    "load_program": "kernels.language.lowering",
    "nearest_kron": "kernels.ffn.kron",
    "hidden_mse": "kernels.losses.ops",
    "hidden_mse_layers": "kernels.losses.ops",
    "lower": "kernels.language.lowering",
    "parse_expression": "kernels.language.expression",
    "parse_layers": "kernels.language.expression",
    "replace_ffn": "kernels.ffn.replace",
    "soft_cross_entropy": "kernels.losses.ops",
    "use_backend": "kernels.dispatch",
    "validate_program": "kernels.language.validation",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
