"""A teacher's model for passes under bf16 autocast: weights of linear layers in bfloat16, rounded once.

Autocast alone rounds every weight again in every pass (BERT-base: 340 MB read, 170 MB written) and the input of
queries, keys and values three times. On a CPU, layers built like BERT's also run their feed-forward part on the fused
op, which keeps intermediate values and residual in float32: half of autocast's error there. With that and the attention
of `engine.teacher.capture`, a pass over BERT-base's shape at 16 x 128 tokens is 1.15 times as fast as with the weights
rounded alone (one core of a Xeon with AMX, median of 25 pairs; 728 ms against 795 at best).

Rejected: the whole model in bfloat16. A pass would be a little faster yet, and the residual stream, which is what the
student learns, would be rounded 2 L times.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.student.ffn import FFN
from kernels.ffn.replace import replace_ffn


class _OneCopy:
    """The bfloat16 copy of the tensor last asked for: modules that are called one after the other share their input."""

    def __init__(self) -> None:
        self.source: Tensor | None = None
        self.version = 0
        self.copy: Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """As a forward pre-hook: the first argument rounded."""
        x = args[0]
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return args
        if x is not self.source or x._version != self.version:
            self.source, self.version, self.copy = x, x._version, x.to(torch.bfloat16)
        return (self.copy, *args[1:])

    def clear(self, *_: Any) -> None:
        """As a forward hook of the model: nothing is kept from pass to pass."""
        self.source = self.copy = None


def rounded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with bfloat16 weights in its linear layers; all other parameters are shared."""
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(False)}
    shared = {id(p): p for p in model.parameters() if id(p) not in linear}
    made = copy.deepcopy(model, shared)
    inputs = _OneCopy()
    read = {dense for ffn in made.modules() if isinstance(ffn, FFN) for dense in (ffn.dense1, ffn.dense2)}
    if next(made.parameters()).device.type == "cpu":
        with contextlib.suppress(ValueError):  # no layer like BERT's: it runs its own code
            for name in replace_ffn(made).names:
                layer: Any = made.get_submodule(name)
                read |= {layer.intermediate.dense, layer.output.dense}
    for module in made.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
            if module not in read:  # a layer with hooks is called, not read
                module.register_forward_pre_hook(inputs.before)
    made.base_model.register_forward_hook(inputs.clear, always_call=True)
    return made.requires_grad_(False)
