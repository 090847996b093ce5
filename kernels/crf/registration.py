"""The `torch.library` operators under `kernels.crf.ops`.

    ffnas::crf_scan(Tensor emissions, Tensor transitions, Tensor start, Tensor end, Tensor lengths, bool best)
        -> (Tensor total, Tensor alpha)
    ffnas::crf_scan_bwd(Tensor emissions, ... Tensor lengths, Tensor alpha, bool best) -> (Tensor tags, Tensor pairs)

The gradient of log Z is the marginals, that of a best score its path: backward is `crf_scan_bwd`, whose tags are the
gradient of emissions and whose pairs are that of transitions. Saved for it: the inputs and alpha, O(n L). Registered as
the losses are (`kernels.losses.registration`); second derivatives are refused.

Rejected: marginals from autograd through the reference's loop, which keeps L x L numbers for every position.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import tensor_ops
from kernels.losses.registration import library, once_differentiable, register, register_autograd
from kernels.reference import crf as crf_reference
from kernels.reference.crf import MOST_TAGS

_CHAIN = "Tensor emissions, Tensor transitions, Tensor start, Tensor end, Tensor lengths"
library.define(f"crf_scan({_CHAIN}, bool best) -> (Tensor, Tensor)")
library.define(f"crf_scan_bwd({_CHAIN}, Tensor alpha, bool best) -> (Tensor, Tensor)")
crf_scan = torch.ops.ffnas.crf_scan.default
crf_scan_bwd = torch.ops.ffnas.crf_scan_bwd.default


def _has_kernels(emissions: Tensor) -> bool:
    return emissions.shape[-1] <= MOST_TAGS and emissions.dtype == torch.float32


def _crf_scan(emissions: Tensor, *rest: Any) -> Any:
    if not _has_kernels(emissions):
        return crf_reference.scan(emissions, *rest)
    return tensor_ops([emissions], "the scan of a CRF").crf_scan(emissions, *rest)


def _crf_scan_fake(emissions: Tensor, *rest: Any) -> Any:
    return emissions.new_empty(emissions.shape[0], dtype=torch.float64), _contiguous(emissions)


def _crf_scan_bwd(emissions: Tensor, *rest: Any) -> Any:
    if not _has_kernels(emissions):
        return crf_reference.scan_bwd(emissions, *rest)
    return tensor_ops([emissions], "the scan of a CRF").crf_scan_bwd(emissions, *rest)


def _crf_scan_bwd_fake(emissions: Tensor, *rest: Any) -> Any:
    batch, _, tags = emissions.shape
    return _contiguous(emissions), emissions.new_empty(batch, tags, tags)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.best = inputs[5]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    emissions, transitions, start, end, lengths, alpha = ctx.saved_tensors
    tags, pairs = crf_scan_bwd(emissions, transitions, start, end, lengths, alpha, ctx.best)
    own = tags * grad.to(tags.dtype)[:, None, None]
    first = own[:, 0] if own.shape[1] else own.sum(1)
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, own.shape[-1])
    final = own.gather(1, last)[:, 0] if own.shape[1] else own.sum(1)
    counts = torch.mv(pairs.flatten(1).T, grad.to(pairs.dtype)).view_as(transitions)
    return (*once_differentiable([own, counts, first.sum(0), final.sum(0)]), None, None)


register("crf_scan", _crf_scan, _crf_scan_fake)
register("crf_scan_bwd", _crf_scan_bwd, _crf_scan_bwd_fake)
register_autograd("crf_scan", _setup, _backward)
