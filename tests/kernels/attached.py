"""Things users attach to layers: each changes what calling a layer does, and none of them its `weight` alone.

`ATTACHMENTS[name](model, select)` attaches to all layers of `model` that `select` takes, alike for alike models: two
models of equal parameters get equal attachments.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, weight_norm


class LoraLinear(nn.Module):
    """PEFT's `lora.Linear` in short: `base(x) + scale b(a(x))` while it is on; merging adds `scale b a` to the base."""

    def __init__(self, base: nn.Linear, rank: int = 3, seed: int = 0) -> None:
        super().__init__()
        self.base_layer, self.scale, self.on = base, 0.5, True
        self.lora_a = nn.Linear(base.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.lora_a, self.lora_b):
            layer.weight.data.normal_(0.0, 0.2, generator=generator)
            layer.to(base.weight.dtype)
        base.requires_grad_(False)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        return self.base_layer.bias

    def forward(self, x):
        out = self.base_layer(x)
        return out + self.scale * self.lora_b(self.lora_a(x)) if self.on else out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base_layer.weight += self.scale * self.lora_b.weight @ self.lora_a.weight
        return self.base_layer


class _Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2.0


class Offload:
    """accelerate's CPU offloading in short: weights are on meta between calls; `forward` is replaced."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.kept = layer, {n: p.detach().clone() for n, p in layer.named_parameters()}
        self.old = layer.forward
        self.away()

    def away(self) -> None:
        for name, value in self.kept.items():
            setattr(self.layer, name, nn.Parameter(value.to("meta"), requires_grad=False))

    def __call__(self, *args):
        for name, value in self.kept.items():
            setattr(self.layer, name, nn.Parameter(value, requires_grad=False))
        try:
            return self.old(*args)
        finally:
            self.away()


def layers(model: nn.Module, select) -> list[tuple[str, nn.Module]]:
    return [(name, m) for name, m in model.named_modules() if select(name, m)]


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, child = name.rpartition(".")
    setattr(model.get_submodule(owner), child, new)


def lora(model, select) -> None:
    for k, (name, layer) in enumerate(layers(model, select)):
        replace(model, name, LoraLinear(layer, seed=k))


def merge(model) -> None:
    for name, layer in layers(model, lambda _, m: isinstance(m, LoraLinear)):
        replace(model, name, layer.merged())


def switch(model, on: bool) -> None:
    for _, layer in layers(model, lambda _, m: isinstance(m, LoraLinear)):
        layer.on = on


def old_weight_norm(model, select) -> None:
    for _, layer in layers(model, select):
        weight_norm(layer)
        layer.weight_g.data *= 1.5


def parametrized_weight_norm(model, select) -> None:
    for _, layer in layers(model, select):
        nn.utils.parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.data *= 1.5


def parametrization(model, select) -> None:
    for _, layer in layers(model, select):
        parametrize.register_parametrization(layer, "weight", _Doubled())


def pruning(model, select) -> None:
    for _, layer in layers(model, select):
        prune.l1_unstructured(layer, "weight", amount=0.4)


def quantized(model, select) -> None:
    for name, layer in layers(model, select):
        done = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)
        replace(model, name, done[0])


def forward_hook(model, select) -> None:
    for _, layer in layers(model, select):
        layer.register_forward_hook(lambda _, __, out: out * 1.25)


def forward_pre_hook(model, select) -> None:
    for _, layer in layers(model, select):
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.25, *args[1:]))


def backward_hook(model, select) -> None:
    for _, layer in layers(model, select):
        layer.register_full_backward_hook(lambda _, grads, __: (grads[0] * 3.0,))


def patched_forward(model, select) -> None:
    for _, layer in layers(model, select):
        layer.forward = partial(lambda old, x: old(x) * 1.25, layer.forward)


def offloaded(model, select) -> None:
    for _, layer in layers(model, select):
        layer.forward = Offload(layer)


def offloaded_by_hook(model, select) -> None:
    """Weights on meta, restored by a pre-hook."""
    for _, layer in layers(model, select):
        kept = layer.weight.detach().clone()
        layer.weight = nn.Parameter(kept.to("meta"), requires_grad=False)
        layer.register_forward_pre_hook(
            lambda m, _, kept=kept: setattr(m, "weight", nn.Parameter(kept, requires_grad=False))
        )
        layer.register_forward_hook(
            lambda m, _, __, kept=kept: setattr(m, "weight", nn.Parameter(kept.to("meta"), requires_grad=False))
        )


class SubLinear(nn.Linear):
    """Another class, as quantization-aware training has it."""

    def forward(self, x):
        return super().forward(x).round(decimals=1)


def subclass(model, select) -> None:
    for _, layer in layers(model, select):
        layer.__class__ = SubLinear


ATTACHMENTS = {
    f.__name__: f
    for f in (
        lora, old_weight_norm, parametrized_weight_norm, parametrization, pruning, quantized, forward_hook,
        forward_pre_hook, backward_hook, patched_forward, offloaded, offloaded_by_hook, subclass,
    )
}  # fmt: skip
NO_GRADIENTS = ("quantized", "offloaded", "offloaded_by_hook")
"""With these the layers' own parameters get no gradients."""
SAME_OUTPUT = ("backward_hook", "offloaded", "offloaded_by_hook", "quantized")
"""These leave outputs as they are, but for rounding."""
