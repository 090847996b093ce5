"""The compile check's jobs for attention and KD losses (`kernels.compile_check`): calls over meta tensors.

    loss_jobs(architectures, quick) -> [(name, arch), ...]       compile_losses(name, arch, note)

Representative variants, since each takes seconds: the paper's sizes (d = 45 and 64, H = 540 and 768, six layers) in
every dtype, with dropout and teacher; without either; heads of 128; both forms of the score loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.triton import attention, losses
from kernels.triton.launch import Compiled, compile_only

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BATCH, _LENGTH, _LONG, _HEADS, _LAYERS = 64, 128, 4096, 12, 6


def loss_jobs(architectures: Sequence[int], quick: bool) -> list[tuple[str, int]]:
    """(name, architecture) of every call to compile."""
    names = [f"losses {kind} {dtype}" for dtype in _DTYPES for kind in _CALLS]
    wide = ["losses wide-attention bfloat16", "losses wide-attention float32", "losses bare-attention bfloat16"]
    chosen = names[:2] if quick else [*(n for n in names if not n.startswith(("losses wide", "losses bare"))), *wide]
    return [(name, arch) for arch in architectures for name in chosen]


def compile_losses(name: str, arch: int, note: Compiled) -> None:
    """Compiles what one job's call launches, forward and backward.

    Args:
        name: of the job.
        arch: compute capability times ten.
        note: see `kernels.triton.launch.compile_only`.
    """
    _, kind, dtype = name.split()
    earlier = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        with compile_only(note, arch):
            _CALLS[kind](_DTYPES[dtype])
    finally:
        torch.backends.cuda.matmul.fp32_precision = earlier


def _heads(width: int, dtype: torch.dtype, length: int = _LENGTH) -> Tensor:
    return torch.empty(_BATCH, length, _HEADS, width, dtype=dtype, device="meta").transpose(1, 2)


def _mask(length: int = _LENGTH) -> Tensor:
    return torch.empty(_BATCH, length, dtype=torch.bool, device="meta")


def _attention(dtype: torch.dtype, d: int = 45, d_t: int | None = 64, p_drop: float = 0.1) -> None:
    qkv = [_heads(d, dtype) for _ in range(3)]
    teacher = [None, None] if d_t is None else [_heads(d_t, dtype) for _ in range(2)]
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    rest = (d**-0.5, p_drop, seed if p_drop else None, *teacher, 1.0)
    context, lse, loss = attention.forward(*qkv, _mask(), *rest)
    attention.backward(torch.empty_like(context), torch.empty_like(loss), *qkv, _mask(), context, lse, *rest)


def _scores(dtype: torch.dtype) -> None:
    sides = [[_heads(d, dtype)] * _LAYERS for d in (45, 45, 64, 64)]
    losses.score_mse(*sides, _mask(), 45**-0.5, 1.0, "auto", 0, True)


def _gram(dtype: torch.dtype) -> None:
    """Both forms, one after the other, as on long sequences."""
    sides = [[_heads(d, dtype, _LONG)] * _LAYERS for d in (45, 45, 64, 64)]
    losses.score_mse(*sides, _mask(_LONG), 45**-0.5, 1.0, "auto", 0, True)


def _hidden(dtype: torch.dtype) -> None:
    states = [torch.empty(_BATCH, _LENGTH, 540, dtype=dtype, device="meta")]
    teacher = [torch.empty(_BATCH, _LENGTH, 768, dtype=dtype, device="meta")]
    fit = [torch.empty(768, 540, device="meta"), torch.empty(768, device="meta")]
    losses.hidden_mse(states, fit, teacher, _mask(), [True] * 3, dtype)


def _soft(dtype: torch.dtype) -> None:
    logits = [torch.empty(_BATCH, 3, dtype=dtype, device="meta") for _ in range(2)]
    losses.soft_cross_entropy(*logits, 2.0, True)


_CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "attention": _attention,
    "hidden": _hidden,
    "scores": _scores,
    "gram": _gram,
    "soft": _soft,
    "wide-attention": lambda dtype: _attention(dtype, 128, 128),
    "bare-attention": lambda dtype: _attention(dtype, 45, None, 0.0),
}
