"""Whether an operator call is a plain one, so that its kernel may be called without PyTorch's dispatcher.

The dispatcher then adds nothing but conversions: 15 us a call, and 70 us while caches hold other things.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether nobody but the kernel has business with a call on `tensors`: no subclass, mode, trace or profile."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
        or torch.compiler.is_compiling()
    ) and all(type(t) in _PLAIN and not t.is_meta for t in tensors)
