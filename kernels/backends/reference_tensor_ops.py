"""Losses, attention and linear layers of the reference backend: plain PyTorch (`kernels.reference`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.call import TensorOps
from kernels.reference import attention as attention_reference
from kernels.reference import losses as losses_reference


class ReferenceTensorOps(TensorOps):
    """Serves every call."""

    score_mse = staticmethod(losses_reference.score_mse)
    hidden_mse = staticmethod(losses_reference.hidden_mse)
    soft_cross_entropy = staticmethod(losses_reference.soft_cross_entropy)
    attention_forward = staticmethod(attention_reference.forward)
    attention_backward = staticmethod(attention_reference.backward)

    @staticmethod
    def supports(tensors: Sequence[Tensor]) -> str | None:
        return None

    @staticmethod
    def linear(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        residual: Tensor | None,
        norm: Sequence[Tensor],
        eps: float,
    ) -> list[Tensor]:
        outs = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        if residual is None:
            return outs
        weight, bias = norm
        return [torch.nn.functional.layer_norm(residual + outs[0], outs[0].shape[-1:], weight, bias, eps)]
