"""Predictions on `kernels.runtime`: one call into C++ for the whole encoder, instead of one per layer and step.

A model takes it by itself where the answer is the same and nothing asks for more than the head's scores or the last
layer's output: on a CPU, in evaluation mode, without gradients, in float32 or under bfloat16 autocast, all layers plain
(`kernels.readable`). Answers per token have rows for padding too, which the runtime does not compute: those of a batch
with padding come from the layers. `FFNAS_RUNTIME=0` turns it off.

Matrices are packed once and used until one of their bytes differs, which every call first looks for
(`kernels.runtime.unchanged`); everything else is read from the parameters themselves. So whatever is written to a
weight, and however, the next answer knows it. `kernels.runtime.Session` on an exported folder does without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers.modeling_utils import PreTrainedModel

from engine.errors import UserError
from engine.student.attention import FFNASAttention
from engine.student.embeddings import FFNASEmbeddings
from engine.student.encoder import FFNASLayer
from engine.student.ffn import FFN, FFNStack
from engine.student.native import describe
from engine.student.pooling import MeanPooler, Pooler
from kernels import readable
from kernels.backends.packed_weights import ENVIRONMENT as LIMIT
from kernels.backends.packed_weights import limit_bytes
from kernels.runtime.description import NativeError
from kernels.runtime.library import Encoder

ENVIRONMENT = "FFNAS_RUNTIME"

_KNOWN: dict[type[nn.Module], Any] = {
    kind: kind.forward
    for kind in (
        FFNASEmbeddings, FFNASLayer, FFNASAttention, FFNStack, FFN, Pooler, MeanPooler, nn.ModuleList, nn.Linear,
        nn.LayerNorm, nn.Embedding, nn.Dropout,
    )
}  # fmt: skip
"""Layers that the runtime stands in for, and what they did when this was imported. Kronecker products, which it has
multiplied out, could change unseen: not among them."""


_SETTINGS = ("eps", "scaling", "head_size", "num_heads", "activation", "max_norm", "trigram")
"""Attributes that a layer's answer depends on beside its parameters; `describe` refuses what the runtime lacks."""


def known(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: the runtime stands in for this module's forward pass, too."""
    _KNOWN[kind] = kind.forward
    return kind


class _Ready(NamedTuple):
    encoder: Encoder
    key: tuple[Any, ...]


class FastPass:
    """The runtime's copy of one model, made at the first call that can use it.

    Copies of a model (`copy.deepcopy`, pickling) get an empty one.
    """

    def __init__(self) -> None:
        self._ready: _Ready | None = None
        self._refused: tuple[Any, ...] | None = None
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> FastPass:
        return FastPass()

    def __reduce__(self) -> tuple[type[FastPass], tuple[()]]:
        return FastPass, ()

    def __call__(
        self, model: PreTrainedModel, input_ids: Any, attention_mask: Any, token_type_ids: Any, wanted: str
    ) -> Tensor | None:
        """Scores (`head`) or rows (`hidden`) as the runtime's `Encoder.run` gives them; None where PyTorch's layers
        have to run."""
        precision = _precision(model, input_ids, attention_mask, token_type_ids)
        if precision is None:
            return None
        per_token = wanted == "hidden" or model.native_head == "tokens"
        if per_token and attention_mask is not None and not bool((attention_mask != 0).all()):
            return None
        key = _key(model, precision)
        if key is None or key == self._refused:
            return None
        ready = self._ready
        if ready is None or ready.key != key or not ready.encoder.unchanged(not torch.cuda.is_initialized()):
            ready = self._make(model, key)
            if ready is None:
                return None
        mask = None if attention_mask is None else (attention_mask != 0).to(torch.uint8).contiguous().numpy()
        types = None if token_type_ids is None else token_type_ids.contiguous().numpy()
        try:
            found = ready.encoder.run(input_ids.contiguous().numpy(), mask, types, wanted, 0.0)
        except NativeError:  # ids that are none: PyTorch says it in its own words; samples of padding alone
            return None
        answer = torch.from_numpy(found)
        return answer if precision == "fp32" or wanted == "hidden" else answer.to(torch.bfloat16)

    def _make(self, model: PreTrainedModel, key: tuple[Any, ...]) -> _Ready | None:
        with self._lock:
            try:
                description, arrays = describe(model, copy=False)
                if sum(a.nbytes for a in arrays.values()) > limit_bytes():
                    raise NativeError(f"weights: more than {LIMIT} allows to be kept packed")
                ready = _Ready(
                    Encoder.from_arrays(description, arrays, torch.get_num_threads(), key[0], watched=True), key
                )
            except (NativeError, UserError):  # no compiler, an expression of a kind it does not have: the layers run
                self._refused = key
                return None
            self._ready = ready
            return ready


def _precision(model: PreTrainedModel, ids: Any, mask: Any, types: Any) -> str | None:
    """`fp32` or `bf16` where a call of such arguments may be the runtime's, else None."""
    if torch.is_grad_enabled() or model.training or os.environ.get(ENVIRONMENT) == "0":
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return None
    if type(ids) is not Tensor or is_functorch_wrapped_tensor(ids):
        return None
    if ids.dtype != torch.int64 or ids.dim() != 2 or 0 in ids.shape:
        return None
    for other in (mask, types):
        if other is not None and (type(other) is not Tensor or other.shape != ids.shape):
            return None
    if (types is not None and types.dtype != torch.int64) or any(
        t is not None and t.device.type != "cpu" for t in (ids, mask, types)
    ):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return "fp32"
    return "bf16" if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def _key(model: PreTrainedModel, precision: str) -> tuple[Any, ...] | None:
    """What the runtime's copy depends on beside the weights' bytes; None where a layer is more than its parameters."""
    if model.config._attn_implementation != "sdpa" or torch.nn.modules.module._has_any_global_hook():
        return None
    places: list[Any] = [precision, torch.get_num_threads()]
    for module in _parts(model):
        kind = type(module)
        if module.training or _KNOWN.get(kind) is not kind.forward or not readable.is_untouched(module):
            return None
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            plain = type(parameter) is nn.Parameter and parameter.device.type == "cpu"
            if not plain or parameter.dtype != torch.float32 or not parameter.is_contiguous():
                return None
            places += (parameter.data_ptr(), parameter.shape, id(module))
        places += (getattr(module, name, None) for name in _SETTINGS)
    return tuple(places)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """All modules but the distillation projection, whose layer no answer passes."""
    for name, child in model._modules.items():
        if child is not None and name != "fit_dense":
            yield child
            yield from _parts(child)
