"""Whether the parameters of a layer may be read instead of the layer being called.

Fused ops take the weights of several layers and compute what calling those one after the other would. That is right for
the plain class and nothing around it. Adapters (LoRA), `weight_norm` and other parametrizations, pruning masks, dynamic
quantization, offloading, observers and whatever else users attach to a layer act through its class, its `forward` or
its hooks, and a layer that has any of them must be called.

Rejected: a list of known adapters. What is asked here is what `nn.Module.__call__` would run, so it holds for libraries
that do not exist yet.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout)
_FORWARDS = {kind: kind.forward for kind in _KINDS}
_PLAIN = (nn.Parameter, Tensor, FakeTensor)
_noted: set[str] = set()


class CalledLayersWarning(UserWarning):
    """Layers that a fused op would read were called instead."""


def register(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: reading the parameters of this class is as good as calling it."""
    _FORWARDS[kind] = kind.forward
    return kind


def are_readable(*modules: nn.Module | None, everywhere: bool = True) -> bool:
    """Whether reading the parameters of all `modules` gives what calling them gives; None stands for no module.

    Args:
        *modules: layers; of a class that is not registered here, none is readable.
        everywhere: hooks registered for all modules of the process count too.
    """
    if everywhere and _has_any_global_hook():
        return False
    for module in modules:
        if module is not None and not (_FORWARDS.get(type(module)) is type(module).forward and is_untouched(module)):
            return False
    return True


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's `forward` and nothing else; hooks of all modules aside.

    accelerate's offloading replaces `forward` and leaves `_hf_hook`.
    """
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or "_hf_hook" in module.__dict__
    )


def are_tensors(*tensors: Tensor | tuple[Tensor, ...] | None) -> bool:
    """Whether parameters are there and ordinary tensors, or tuples of such.

    Those of a subclass (quantized, sharded) belong to the layer's own code, as does what a layer without them does.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN and not (isinstance(tensor, tuple) and are_tensors(*tensor)):
            return False
    return True


def note(what: str, **modules: nn.Module | None) -> None:
    """Warns, once per reason, that `what` calls its layers.

    Args:
        what: the fused layer.
        **modules: its layers by name, "." written "__"; the first that explains it is named.
    """
    if torch.compiler.is_compiling():
        return
    other = "hooks are registered for all modules" if _has_any_global_hook() else "children of it were replaced"
    found = (_reason(name.replace("__", "."), m) for name, m in modules.items() if m is not None)
    text = f"{what} runs in plain PyTorch, its layers called one by one: {next(filter(None, found), other)}"
    if text not in _noted:
        _noted.add(text)
        warnings.warn(f"ffnas: {text} (said once)", CalledLayersWarning, stacklevel=3)


def _reason(name: str, module: nn.Module) -> str | None:
    kind = type(module)
    if "forward" in module.__dict__:
        return f"{name} has a forward of its own"
    if not is_untouched(module):
        return f"{name} has hooks"
    if _FORWARDS.get(kind) is not kind.forward:
        return f"{name} is a {kind.__name__}"
    parameters = [module._parameters.get(key) for key in ("weight", "bias") if key in module._parameters]
    return None if are_tensors(*parameters) else f"{name} has parameters that are missing or no plain tensors"
