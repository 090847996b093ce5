"""Forward and every gradient at the benchmark's sizes against float64, with uninitialized memory filled with NaN.

The rule is that of the tests (tests/kernels/ffn_accuracy.py): relative error at most twice that of plain PyTorch in the
same precision, plus `FLOOR`, for cases that it computes nearly exactly. A tensor with a NaN, or an element never
written, has an infinite error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ffn_cases import DTYPES, Case, inputs
from benchmarks.gpu.records import LOST, Line, Records, refusal
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import OURS, setting
from kernels import fused_ffn, parse_expression, use_backend
from kernels.attention.ops import fused_attention
from kernels.losses.ops import attention_score_mse, hidden_mse_layers, soft_cross_entropy
from kernels.reference.ffn import ffn

FLOOR = {"fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}
"""8 to 16 roundings: operands, products, elementwise code and result are each rounded once or twice."""
NAMES = ("out", "x", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that PyTorch hands out uninitialized holds NaN in the block."""
    earlier = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(earlier[0], warn_only=earlier[1])


def run(records: Records, scale: Scale, out: Path) -> None:
    del out
    for case in scale.exact():
        records.case(str(case), lambda case=case: compared(case, records))
    for name, measure in losses(scale).items():
        records.case(name, measure)


def compared(case: Case, records: Records) -> Line:
    """Per side the tensors whose error is too large, and all errors."""
    tensors, expression = inputs(case), parse_expression(case.expression)
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])

    def results(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in leaves]
        with torch.autocast(case.device, DTYPES.get(case.autocast), enabled=bool(case.autocast) and _low(leaves)):
            value = function(*leaves, expression)
        return [value.detach(), *torch.autograd.grad(value, leaves, weight.to(value.dtype))]

    exact = results(ffn, [t.double() for t in tensors])
    eager = errors(results(ffn, tensors), exact)
    found: Line = {"eager": dict(zip(NAMES, eager, strict=True)), "sides": {}, "wrong": {}, "refused": {}}
    for name in OURS:
        if not records.attempt(str(case), name):
            found["refused"][name] = LOST
            continue
        try:
            with setting(name), poisoned():
                own = errors(results(fused_ffn, tensors), exact)
        except Exception as error:  # a side that cannot run, for whatever reason, is part of the result
            found["refused"][name] = refusal(error)
            continue
        found["sides"][name] = dict(zip(NAMES, own, strict=True))
        found["wrong"][name] = too_large(own, eager, case.autocast or case.dtype, NAMES)
    return found


def _low(leaves: Sequence[Tensor]) -> bool:
    return leaves[0].dtype != torch.float64


def errors(values: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Distance relative to the exact tensor's norm; infinite where something is not finite."""
    found = []
    for value, right in zip(values, exact, strict=True):
        distance = float((value.double() - right).norm() / right.norm().clamp_min(1e-30))
        found.append(distance if math.isfinite(distance) else math.inf)
    return found


def too_large(own: Sequence[float], eager: Sequence[float], dtype: str, names: Sequence[str]) -> list[str]:
    """Names of the tensors beyond the rule."""
    return [n for n, a, b in zip(names, own, eager, strict=True) if not a <= 2 * b + FLOOR[dtype]]


def losses(scale: Scale) -> dict[str, Callable[[], Line]]:
    """Attention with its score loss, and the KD losses, at a distillation step's sizes."""
    samples, heads, length, d, d_t, wide = (2, 2, 9, 5, 6, 10) if scale.rehearses else (16, 12, 128, 45, 64, 768)
    hidden = scale.hidden

    def drawn(*shape: int, seed: int) -> Tensor:
        made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return made.to(scale.device, DTYPES[scale.dtype])

    mask = (torch.arange(length)[None] < torch.linspace(1, length, samples).int()[:, None]).to(scale.device)
    q, k, v = (drawn(samples, heads, length, d, seed=s) for s in range(3))
    q_t, k_t = (drawn(samples, heads, length, d_t, seed=s) for s in (3, 4))
    states, teacher = drawn(samples, length, hidden, seed=5), drawn(samples, length, wide, seed=6)
    weight, bias = drawn(wide, hidden, seed=7) / hidden**0.5, drawn(wide, seed=8)
    logits = [drawn(samples, 3, seed=s) for s in (9, 10)]

    def attend(*t: Tensor) -> list[Tensor]:
        context, loss = fused_attention(*t[:3], mask, teacher=(t[3], t[4]))
        assert loss is not None
        return [context, loss]

    def project(h: Tensor, w: Tensor, b: Tensor, t: Tensor) -> list[Tensor]:
        return [hidden_mse_layers([h], w, b, [t], mask)]

    calls: dict[str, tuple[Callable[..., list[Tensor]], list[Tensor], int]] = {
        "attention with score loss": (attend, [q, k, v, q_t, k_t], 3),
        "score loss": (lambda *t: [attention_score_mse(*t, mask)], [q, k, q_t, k_t], 2),
        "hidden loss": (project, [states, weight, bias, teacher], 3),
        "soft cross-entropy": (lambda s, t: [soft_cross_entropy(s, t, 2.0)], logits, 1),
    }
    return {name: lambda call=call: _loss(*call, scale) for name, call in calls.items()}


def _loss(function: Callable[..., list[Tensor]], given: list[Tensor], trained: int, scale: Scale) -> Line:
    """Values and gradients of the first `trained` tensors, by Triton and by PyTorch."""

    def results(backend: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        tensors = [t.detach().requires_grad_(k < trained) for k, t in enumerate(tensors)]
        with use_backend(backend, strict=True):
            values = function(*tensors)
            whole = torch.stack([v.double().square().sum() for v in values]).sum()
            return [*(v.detach() for v in values), *torch.autograd.grad(whole, tensors[:trained])]

    exact = results("reference", [t.double() for t in given])
    eager = errors(results("reference", given), exact)
    with poisoned():
        own = errors(results("triton", given), exact)
    names = [f"value {k}" for k in range(len(own) - trained)] + [f"gradient {k}" for k in range(trained)]
    wrong = too_large(own, eager, scale.dtype, names)
    return {"eager": dict(zip(names, eager, strict=True)), "sides": {"triton": own}, "wrong": {"triton": wrong}}
