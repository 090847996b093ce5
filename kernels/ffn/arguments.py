"""Checks of the FFN op's arguments: every error names the argument, what it is and what it must be.

Checked once per call, before any backend sees it, so that a backend may index memory without asking again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.call import FFNCall

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_call(call: FFNCall) -> None:
    """Raises `ValueError` unless all of a call's tensors fit together."""
    x, n = call.x, len(call.w1)
    if x.dim() != 2:
        raise ValueError(f"x must have two dimensions [tokens, hidden] here, got shape {_shape(x)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be floating ({_names(DTYPES)}), got {x.dtype}")
    if n == 0:
        raise ValueError("w1 is empty: a stack has at least one FFN")
    if call.w1[0].dim() != 2:
        raise ValueError(f"w1 must have two dimensions [inner, hidden], got shape {_shape(call.w1[0])}")
    hidden, inner = x.shape[1], call.w1[0].shape[0]
    if hidden == 0 or inner == 0:
        raise ValueError(f"hidden width {hidden} and inner width {inner} must be at least 1 (x and w1)")
    if x.dtype not in (call.compute_dtype, torch.float32):
        raise ValueError(f"x is {x.dtype}, which cannot be used with products in {call.compute_dtype}")
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    _check_group("w1", call.w1, n, (inner, hidden), x, (x.dtype, call.compute_dtype, wide))
    dtypes = (call.w1[0].dtype,)
    _check_group("b1", call.b1, n, (inner,), x, dtypes)
    _check_group("w2", call.w2, n, (hidden, inner), x, dtypes)
    _check_group("b2", call.b2, n, (hidden,), x, dtypes)
    if len(call.ln_weight) or len(call.ln_bias):
        _check_group("ln_weight", call.ln_weight, n, (hidden,), x, (x.dtype, wide))
        _check_group("ln_bias", call.ln_bias, n, (hidden,), x, (call.ln_weight[0].dtype,))
    elif call.p_drop:
        raise ValueError(f"p_drop={call.p_drop} without LayerNorm: the bare expression has no dropout")
    _check_dropout(call)


def _check_group(
    name: str, tensors: Sequence[Tensor], n: int, shape: tuple[int, ...], x: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    if len(tensors) != n:
        raise ValueError(f"{name} has {len(tensors)} tensors, expected {n}, one per FFN of the stack")
    device = x.device
    for k, t in enumerate(tensors):
        if t.shape != shape or t.dtype not in dtypes or t.device != device or (t.stride(-1) != 1 and t.shape[-1] > 1):
            raise ValueError(_complaint(name if n == 1 else f"{name}[{k}]", t, shape, x, dtypes))


def _complaint(name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, dtypes: Sequence[torch.dtype]) -> str:
    """What is wrong with a tensor that failed a check of its group."""
    if t.shape != shape:
        return f"{name} has shape {_shape(t)}, expected {tuple(shape)} (x has hidden width {x.shape[1]})"
    if t.dtype not in dtypes:
        allowed = " or ".join(dict.fromkeys(str(d) for d in dtypes))
        return f"{name} is {t.dtype}, but with x in {x.dtype} it must be {allowed}"
    if t.device != x.device:
        return f"{name} is on {t.device}, but x is on {x.device}"
    return f"{name} has strides {tuple(t.stride())}: the last dimension must have stride 1"


def _check_dropout(call: FFNCall) -> None:
    if not 0.0 <= call.p_drop <= 1.0:
        raise ValueError(f"p_drop must lie in [0, 1], got {call.p_drop!r}")
    if not call.eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {call.eps!r}")
    seed = call.seed
    if (seed is None) != (call.p_drop == 0.0):
        raise ValueError(f"seed must be given exactly when p_drop > 0, got p_drop={call.p_drop!r} and seed={seed!r}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != call.x.device):
        raise ValueError(f"seed must be one int64 on {call.x.device}, got {seed.dtype} {_shape(seed)} on {seed.device}")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
