"""The `torch.library` operators under `kernels.ffn.ops`, put together from schemas, autograd, autocast and vmap rules.

    ffnas::ffn_fwd(Tensor x, Tensor[] w1, Tensor[] b1, Tensor[] w2, Tensor[] b2, Tensor[] ln_weight, Tensor[] ln_bias,
                   Tensor program, int flags, float p_drop, Tensor? seed, float eps, bool save,
                   ScalarType? compute_dtype=None) -> (Tensor out, Tensor[] saved)
    ffnas::ffn_bwd(Tensor grad_out, Tensor x, Tensor[] w1, ... ln_bias, Tensor program, int flags, float p_drop,
                   Tensor? seed, float eps, ScalarType? compute_dtype, Tensor[] saved, bool[] needs) -> Tensor[]

A call is a stack of n >= 1 FFNs that share a program; x is [T, H] (`kernels.call`). `flags` is the program's header
word 6, since tracing cannot read tensors. `needs` marks the wanted gradients in the order x, w1 * n, ..., ln_bias * n.
The first of `saved` has the shape [number of the backend, 0], so that backward runs where forward ran. Both are
functional; second derivatives are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.ffn.autocast import AUTOCAST_DEVICES, autocast_arguments, autocast_key
from kernels.ffn.autograd import backward_autograd, call_forward, forward_autograd
from kernels.ffn.schemas import (
    LIBRARY,
    backward_fake,
    backward_kernel,
    ffn_bwd,
    ffn_fwd,
    forward_fake,
    forward_kernel,
    trace_tag,
)

__all__ = ["call_forward", "ffn_bwd", "ffn_fwd", "trace_tag"]


def _register_autocast(device: str) -> None:
    key = autocast_key(device)

    def cast(*args: Any) -> tuple[Tensor, list[Tensor]]:
        args = tuple(autocast_arguments(device, args))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return ffn_fwd(*args)

    ffn_fwd.py_impl(key)(cast)
    LIBRARY.impl("ffn_fwd", lambda _, *args: cast(*args), key.name, with_keyset=True)


def _sample(value: Any, dim: Any, k: int) -> Any:
    """Sample `k` of a batched argument (tensor, list of tensors, or anything unbatched)."""
    if isinstance(value, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
        return [_sample(v, d, k) for v, d in zip(value, dims, strict=True)]
    return value.select(dim, k) if dim is not None and isinstance(value, Tensor) else value


def _forward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = [ffn_fwd(*_sample(args, in_dims, k)) for k in range(info.batch_size)]
    saved = [torch.stack(column) for column in zip(*(s for _, s in results), strict=True)]
    return (torch.stack([out for out, _ in results]), saved), (0, [0] * len(saved))


def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    results = [ffn_bwd(*_sample(args, in_dims, k)) for k in range(info.batch_size)]
    stacked = [torch.stack(column) for column in zip(*results, strict=True)]
    return stacked, [0] * len(stacked)


LIBRARY.impl("ffn_fwd", forward_kernel, "CompositeExplicitAutograd")
LIBRARY.impl("ffn_bwd", backward_kernel, "CompositeExplicitAutograd")
LIBRARY.impl("ffn_fwd", forward_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("ffn_bwd", backward_autograd, "Autograd", with_keyset=True)
for _device in AUTOCAST_DEVICES:
    _register_autocast(_device)
torch.library.register_fake("ffnas::ffn_fwd", forward_fake, lib=LIBRARY)
torch.library.register_fake("ffnas::ffn_bwd", backward_fake, lib=LIBRARY)
torch.library.register_vmap("ffnas::ffn_fwd", _forward_vmap, lib=LIBRARY)
torch.library.register_vmap("ffnas::ffn_bwd", _backward_vmap, lib=LIBRARY)
