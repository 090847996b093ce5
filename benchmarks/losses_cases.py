"""The losses' benchmark cases: one distillation step's losses and attention of EfficientBERT under a BERT-base teacher.

    eager       softmax attention and the published code's losses, everything S×S materialized, one call a layer
    apart       PyTorch's scaled_dot_product_attention, and our losses, one call for all layers
    step        as apart, but queries are scaled first, and in bf16 attention is ours: a step without one pass
    together    `fused_attention` with the score loss in it, and our hidden-state loss

Each side runs forward and backward: attention and score loss of `LAYERS` layers, hidden-state loss of `LAYERS` + 1.
Everything else of the step (projections, FFNs, the teacher) is left out. bf16 means bf16 queries, keys, values and
states, under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import attention_score_mse_layers, fused_attention, hidden_mse_layers
from kernels.losses.paper import attention_score_mse_paper, hidden_mse_paper

LAYERS, HEADS, STUDENT, TEACHER = 6, 12, 540, 768
LENGTHS = (128, 384, 512, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("eager", "apart", "step", "together")
PARTS = ("all", "attention", "hidden")


@dataclass(frozen=True)
class Case:
    """`part` of the work (attention with the score loss, hidden states, or both) on sequences of `length`.

    `sequences` of them, or as many as make 2048 tokens.
    """

    dtype: str
    length: int
    part: str = "all"
    layers: int = LAYERS
    sequences: int | None = None

    @property
    def batch(self) -> int:
        return max(1, 2048 // self.length) if self.sequences is None else self.sequences

    def __str__(self) -> str:
        return f"{self.dtype} {self.part} B={self.batch} S={self.length}"


@dataclass
class Inputs:
    qkv: list[list[Tensor]]
    teacher: list[list[Tensor]]
    states: list[Tensor]
    teacher_states: list[Tensor]
    upstream: Tensor
    fit: nn.Linear
    mask: Tensor


def inputs(case: Case) -> Inputs:
    """Random tensors; queries, keys and values are transposed views of [B, S, heads, d], as after a head split."""
    torch.manual_seed(0)
    dtype, shape = DTYPES[case.dtype], (case.batch, case.length)

    def draw(width: int, grad: bool) -> Tensor:
        return torch.randn(*shape, width).to(dtype).requires_grad_(grad)

    def split(width: int, grad: bool) -> Tensor:
        x = torch.randn(*shape, HEADS, width // HEADS).to(dtype).transpose(1, 2)
        return x.requires_grad_(grad)

    attends, compares = case.part != "hidden", case.part != "attention"
    layers = range(case.layers)
    return Inputs(
        [[split(STUDENT, True) for _ in "qkv"] for _ in layers] if attends else [],
        [[split(TEACHER, False) for _ in "qk"] for _ in layers] if attends else [],
        [draw(STUDENT, True) for _ in range(case.layers + 1)] if compares else [],
        [draw(TEACHER, False) for _ in range(case.layers + 1)] if compares else [],
        split(STUDENT, False),
        nn.Linear(STUDENT, TEACHER),
        torch.ones(shape, dtype=torch.bool),
    )


def runner(case: Case, side: str) -> Callable[[], object]:
    """One forward and backward pass of `side`.

    Raises:
        ValueError: no side of that name.
    """
    if side not in SIDES:
        raise ValueError(f"side {side!r} is none of {', '.join(SIDES)}")
    given = inputs(case)
    leaves = [t for layer in given.qkv for t in layer] + given.states
    leaves += list(given.fit.parameters()) if given.states else []
    forward = {"eager": _eager, "apart": _apart, "step": _step, "together": _together}[side]

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.dtype == "bf16"):
            contexts, loss = forward(given)
        ones = torch.ones((), dtype=loss.dtype)
        torch.autograd.grad([*contexts, loss], leaves, [*[given.upstream] * len(contexts), ones])

    return run


def _eager(given: Inputs) -> tuple[list[Tensor], Tensor]:
    contexts, loss = [], torch.zeros(())
    bias = torch.zeros(given.mask.shape[0], 1, 1, given.mask.shape[1])
    for (q, k, v), (q_t, k_t) in zip(given.qkv, given.teacher, strict=True):
        p = (q @ k.mT * q.shape[-1] ** -0.5 + bias.to(q.dtype)).softmax(-1)
        contexts.append(p.to(v.dtype) @ v)
        loss = loss + attention_score_mse_paper(q, k, q_t, k_t, given.mask)
    for h_s, h_t in zip(given.states, given.teacher_states, strict=True):
        loss = loss + hidden_mse_paper(h_s, given.fit.weight, given.fit.bias, h_t)
    return contexts, loss


def _hidden(given: Inputs) -> Tensor:
    if not given.states:
        return torch.zeros(())
    return hidden_mse_layers(given.states, given.fit.weight, given.fit.bias, given.teacher_states, given.mask)


def _sdpa(qkv: list[Tensor], mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, attn_mask=mask[:, None, None, :])


def _apart(given: Inputs) -> tuple[list[Tensor], Tensor]:
    contexts = [_sdpa(qkv, given.mask) for qkv in given.qkv]
    loss = _hidden(given)
    if given.qkv:
        q, k, _ = zip(*given.qkv, strict=True)
        q_t, k_t = zip(*given.teacher, strict=True)
        loss = loss + attention_score_mse_layers(q, k, q_t, k_t, given.mask)
    return contexts, loss


def _step(given: Inputs) -> tuple[list[Tensor], Tensor]:
    low = bool(given.qkv) and given.qkv[0][0].dtype == torch.bfloat16
    contexts = [fused_attention(*qkv, given.mask)[0] if low else _sdpa(qkv, given.mask) for qkv in given.qkv]
    loss = _hidden(given)
    if given.qkv:
        q, k, _ = zip(*given.qkv, strict=True)
        q_t, k_t = zip(*given.teacher, strict=True)
        scaled = [x * x.shape[-1] ** -0.5 for x in q]
        loss = loss + attention_score_mse_layers(scaled, k, q_t, k_t, given.mask, scale_s=1.0)
    return contexts, loss


def _together(given: Inputs) -> tuple[list[Tensor], Tensor]:
    contexts, loss = [], _hidden(given)
    for qkv, teacher in zip(given.qkv, given.teacher, strict=True):
        context, score = fused_attention(*qkv, given.mask, teacher=(teacher[0], teacher[1]))
        contexts.append(context)
        loss = loss + score
    return contexts, loss
