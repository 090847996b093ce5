"""Autocast of `ffnas::ffn_fwd`: sets the dtype of the matrix products and leaves x and parameters as they are."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from kernels.ffn.schemas import with_default

AUTOCAST_DEVICES = ("cpu", "cuda")


def autocast_arguments(device: str, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments with autocast's dtype for the products, if autocast is on and none was given."""
    *rest, compute_dtype = with_default(args)
    x = rest[0]
    open_choice = compute_dtype is None and x.dtype != torch.float64 and device in AUTOCAST_DEVICES
    if open_choice and torch.is_autocast_enabled(device):
        compute_dtype = torch.get_autocast_dtype(device)
        if x.dtype not in (torch.float32, compute_dtype):
            rest[0] = x.to(compute_dtype)
    return *rest, compute_dtype


def autocast_key(device: str) -> torch._C.DispatchKey:
    return getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device))


AUTOCAST_KEYS = functools.reduce(operator.or_, (torch._C.DispatchKeySet(autocast_key(d)) for d in AUTOCAST_DEVICES))
