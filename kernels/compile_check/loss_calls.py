"""What is compiled of attention, the KD losses and the scan of CRFs: calls of their Triton drivers over meta tensors.

Representative variants, since each takes seconds: the paper's sizes (d = 45 and 64, H = 540 and 768, six layers) in
every dtype, with dropout and teacher; attention without either; heads of 128; both forms of the score loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kernels.compile_check.call import Call

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BATCH, _LENGTH, _LONG, _HEADS, _LAYERS = 64, 128, 4096, 12, 6


def loss_calls(quick: bool) -> Iterator[Call]:
    """Attention, score loss, hidden-state loss and soft cross-entropy, forward and backward."""
    for kind in ("attention", "hidden") if quick else ("attention", "hidden", "scores", "gram", "soft"):
        for dtype in ("bfloat16",) if quick else _DTYPES:
            yield Call(f"losses {kind} {dtype}", run_losses, (kind, dtype))
    if not quick:
        for tags in (9, 17, 64):
            yield Call(f"losses crf {tags} tags", _crf, (tags,))
        for kind, dtype in (("wide", "bfloat16"), ("bare", "bfloat16")):
            yield Call(f"losses {kind} {dtype}", run_losses, (kind, dtype))


def run_losses(kind: str, dtype: str) -> None:
    """One call, over meta tensors."""
    earlier = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        _CALLS[kind](_DTYPES[dtype])
    finally:
        torch.backends.cuda.matmul.fp32_precision = earlier


def _heads(width: int, dtype: torch.dtype, length: int = _LENGTH) -> Tensor:
    return torch.empty(_BATCH, length, _HEADS, width, dtype=dtype, device="meta").transpose(1, 2)


def _mask(length: int = _LENGTH) -> Tensor:
    return torch.empty(_BATCH, length, dtype=torch.bool, device="meta")


def _attention(dtype: torch.dtype, d: int = 45, d_t: int | None = 64, p_drop: float = 0.1) -> None:
    from kernels.triton import attention

    q, k, v = (_heads(d, dtype) for _ in range(3))
    q_t, k_t = (None if d_t is None else _heads(d_t, dtype) for _ in range(2))
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    rest = (d**-0.5, p_drop, seed if p_drop else None, q_t, k_t, 1.0)
    context, lse, loss = attention.forward(q, k, v, _mask(), *rest)
    attention.backward(torch.empty_like(context), torch.empty_like(loss), q, k, v, _mask(), context, lse, *rest)


def _scores(dtype: torch.dtype) -> None:
    from kernels.triton import losses

    q_s, k_s, q_t, k_t = ([_heads(d, dtype)] * _LAYERS for d in (45, 45, 64, 64))
    losses.score_mse(q_s, k_s, q_t, k_t, _mask(), 45**-0.5, 1.0, "auto", 0, True)


def _gram(dtype: torch.dtype) -> None:
    """Both forms, one after the other, as on long sequences."""
    from kernels.triton import losses

    q_s, k_s, q_t, k_t = ([_heads(d, dtype, _LONG)] * _LAYERS for d in (45, 45, 64, 64))
    losses.score_mse(q_s, k_s, q_t, k_t, _mask(_LONG), 45**-0.5, 1.0, "auto", 0, True)


def _hidden(dtype: torch.dtype) -> None:
    from kernels.triton import losses

    states = [torch.empty(_BATCH, _LENGTH, 540, dtype=dtype, device="meta")]
    teacher = [torch.empty(_BATCH, _LENGTH, 768, dtype=dtype, device="meta")]
    fit = [torch.empty(768, 540, device="meta"), torch.empty(768, device="meta")]
    losses.hidden_mse(states, fit, teacher, _mask(), [True] * 3, dtype)


def _crf(tags: int) -> None:
    """Both directions in both semirings."""
    from kernels.triton import crf

    shapes = ((_BATCH, _LENGTH, tags), (tags, tags), (tags,), (tags,))
    emissions, transitions, start, end = (torch.empty(s, device="meta") for s in shapes)
    lengths = torch.empty(_BATCH, dtype=torch.int64, device="meta")
    for best in (False, True):
        _, alpha = crf.scan(emissions, transitions, start, end, lengths, best)
        crf.scan_bwd(emissions, transitions, start, end, lengths, alpha, best)


def _soft(dtype: torch.dtype) -> None:
    from kernels.triton import losses

    student, teacher = (torch.empty(_BATCH, 3, dtype=dtype, device="meta") for _ in range(2))
    losses.soft_cross_entropy(student, teacher, 2.0, True)


_CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "attention": _attention,
    "hidden": _hidden,
    "scores": _scores,
    "gram": _gram,
    "soft": _soft,
    "wide": lambda dtype: _attention(dtype, 128, 128),
    "bare": lambda dtype: _attention(dtype, 45, None, 0.0),
}
