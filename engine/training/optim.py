"""Optimizer and schedule of every training in ffnas: AdamW without decay on biases and norms, linear warm-up and decay.

Chosen: torch's own fused AdamW (one kernel over all parameters, on the CPU since torch 2.4 and on CUDA) and a
`LambdaLR`, whose state is two integers. Rejected: transformers' `get_scheduler`, which brings a dozen schedules and
hides the one we use, and the `foreach` AdamW, slower than fused on both devices.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from engine.training.settings import PhaseSettings

_FUSED_DEVICES = frozenset({"cpu", "cuda"})
_FUSED_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def build_optimizer(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    lr: float | Tensor,
    weight_decay: float = 0.01,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    capturable: bool = False,
) -> AdamW:
    """AdamW over the trainable parameters; no weight decay on vectors (biases, LayerNorm weights).

    Args:
        model: a module, or named parameters (shared ones are taken once).
        lr: learning rate at the end of the warm-up; a scalar tensor is read at every step.
        weight_decay: decoupled decay, applied to matrices only.
        capturable: whether steps may be part of a CUDA graph.

    Raises:
        ValueError: nothing to train.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else model
    parameters = list({id(p): p for _, p in named if p.requires_grad}.values())
    if not parameters:
        raise ValueError("build_optimizer: no parameter requires a gradient")
    # A bias or a norm weight is exactly a parameter with fewer than two dimensions; no regular expression over names.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED_DEVICES and p.dtype in _FUSED_DTYPES for p in parameters)
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused, capturable=capturable)


def clipped_step(optimizer: Optimizer, parameters: Iterable[Tensor], clip: float) -> Tensor:
    """Clips the gradients' common norm to `clip` and steps, unless that norm is NaN or infinite.

    A step whose gradients overflowed (bf16 has float32's range, so that is rare) changes neither parameters nor
    moments: a single one would make every weight NaN for good. Nothing waits for the device: fused AdamW takes the
    verdict as a tensor. Rejected: loss scaling, which float16 needs and no other supported precision does.

    Returns:
        1.0 where the step was left out, otherwise 0.0; float32 scalar on the parameters' device.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip)
    skipped = 1.0 - norm.isfinite().float()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = skipped  # type: ignore[attr-defined]
        optimizer.step()
    elif not skipped.item():
        optimizer.step()
    return skipped


def warmup_steps(ratio: float, total_steps: int, *, published: bool = False) -> int:
    """Steps of a warm-up that is a share of all; EfficientBERT's published code rounds down."""
    return int(ratio * total_steps) if published else round(ratio * total_steps)


def linear_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int, *, published: bool = False) -> LambdaLR:
    """Learning rate rises linearly over `warmup_steps`, then falls linearly to 0 at `total_steps`.

    Step k (counted from 0) runs at `lr * (k + 1) / (warmup_steps + 1)` while warming up, so that the first step is
    not lost to a rate of 0; `published`: at `lr * k / warmup_steps`, as EfficientBERT's published code.

    Raises:
        ValueError: total_steps < 1, or warmup_steps outside 0..total_steps.
    """
    if total_steps < 1 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"linear_schedule: need 0 <= warmup_steps <= total_steps >= 1, got {warmup_steps}, {total_steps}"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps if published else (step + 1) / (warmup_steps + 1)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return LambdaLR(optimizer, factor)


class TrainingSteps:
    """Optimizer, schedule and clipping of one model in one phase: what follows every backward pass.

    Args:
        model: to train.
        settings: of the phase.
        total_steps: of the phase.
        published: with the published code's learning rates.

    Attributes:
        parameters: those that are trained.
    """

    def __init__(self, model: nn.Module, settings: PhaseSettings, total_steps: int, *, published: bool = False) -> None:
        self.settings = settings
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(model, lr=settings.lr, weight_decay=settings.weight_decay)
        warmup = warmup_steps(settings.warmup_ratio, total_steps, published=published)
        self.scheduler = linear_schedule(self.optimizer, warmup, total_steps, published=published)

    def take(self) -> Tensor:
        """One step by the gradients that are there, which are gone afterwards; see `clipped_step`."""
        skipped = clipped_step(self.optimizer, self.parameters, self.settings.clip)
        self.scheduler.step()
        self.forget_gradients()
        return skipped

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        return self.settings.lr * self.scheduler.lr_lambdas[0](step)

    def forget_gradients(self) -> None:
        """Frees the gradients."""
        self.optimizer.zero_grad(set_to_none=True)
