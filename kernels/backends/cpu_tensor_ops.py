"""The CPU backend's losses, attention and linear layers (csrc/cpu/losses_*.h, attention*.h, linear.h), called as words
and reals.

Served are float32 and bfloat16 tensors. Products are in bfloat16 where all tensors of the student and the teacher are
(or autocast says so, for the projection of `hidden_mse`), else in float32; accumulation, softmax and sums are float32,
totals float64. Tensors of heads are read in place with any strides as long as the last dimension is contiguous.

Rejected: one entry point per operation. One reader on the C++ side is checked against one writer here.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backends.packed_weights import DTYPE_CODES, PackedWeights
from kernels.call import TensorOps
from kernels.reference.losses import gradient_like
from kernels.reference.philox import drop_threshold

_SCORE, _HIDDEN, _SOFT, _ATTEND, _ATTEND_BACKWARD, _LINEAR = range(6)
_FORMS = {"auto": 0, "dense": 1, "tiled": 1, "gram": 2}
_ERRORS = {1: "out of memory", 3: "the call does not fit this build of the library"}
_NO_HEADS = (0, 0, 0, 0, 0)
_NO_VIEW = (0, 0, 0)

Tensors = Sequence[Tensor]


class CpuTensorOps(TensorOps):
    """See the module.

    Args:
        library: the loaded library.
        abi: its interface version.
        isa: instruction set by the dtype of products.
        packed: weights of linear layers that were packed before.
    """

    def __init__(self, library: ctypes.CDLL, abi: int, isa: dict[torch.dtype, int], packed: PackedWeights) -> None:
        self._call = library.ffnas_loss
        self._call.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self._call.restype = ctypes.c_int
        self._abi, self._isa, self._packed = abi, isa, packed

    def supports(self, tensors: Tensors) -> str | None:
        """None where calls with these tensors can be served, else one line saying why not."""
        for t in tensors:
            if t.device.type != "cpu":
                return f"it serves CPU tensors, got one on {t.device}"
            if t.dtype not in DTYPE_CODES:
                return f"its losses and attention serve float32 and bfloat16, got {t.dtype}"
        return None

    def score_mse(
        self, q_s: Tensors, k_s: Tensors, q_t: Tensors, k_t: Tensors, mask: Tensor, scale_s: float, scale_t: float,
        method: str, tile: int, gradients: bool,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Tiles have the kernels' own size; "dense" is tiled here."""
        del tile
        grads = [gradient_like(x) for x in (*q_s, *k_s)] if gradients else []
        loss = torch.zeros((), dtype=torch.float32)
        if mask.numel() and q_s[0].numel() and q_t[0].numel():
            layers = len(q_s)
            inputs = [[_rows_contiguous(x) for x in group] for group in (q_s, k_s, q_t, k_t)]
            mask = mask.contiguous()
            (_, heads, _, d_s), d_t = q_s[0].shape, q_t[0].shape[-1]
            words = self._words(_SCORE, _common_dtype(*q_s, *k_s, *q_t, *k_t), loss.data_ptr(), *_mask(mask))
            words.extend((layers, heads, d_s, d_t, _FORMS[method]))
            outputs = [grads[:layers], grads[layers:]] if gradients else [[None] * layers] * 2
            for layer in zip(*inputs, *outputs, strict=True):
                for tensor in layer:
                    words.extend(_NO_HEADS if tensor is None else _heads(tensor))
            self._run(words, scale_s, scale_t)
        return loss, grads

    def hidden_mse(
        self, h_s: Tensors, fit: Tensors, h_t: Tensors, mask: Tensor, needs: Sequence[bool],
        compute_dtype: torch.dtype | None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        weight, bias = fit[0], fit[1] if len(fit) > 1 else None
        loss = torch.zeros((), dtype=torch.float32)
        grads = [gradient_like(h) if needs[0] else None for h in h_s]
        shared = [torch.zeros_like(p, memory_format=torch.contiguous_format) if p is not None and n else None
                  for p, n in zip((weight, bias), needs[1:], strict=True)]  # fmt: skip
        if mask.numel() and weight.numel():
            inputs = [[_rows_contiguous(h) for h in group] for group in (h_s, h_t)]
            weight, mask = _rows_contiguous(weight), mask.contiguous()
            dtype = compute_dtype if compute_dtype is not None else weight.dtype
            sizes = (len(h_s), weight.shape[1], weight.shape[0])
            words = self._words(_HIDDEN, dtype, loss.data_ptr(), *_mask(mask), *sizes)
            for p in (weight, bias, *shared):
                words.extend(_NO_VIEW if p is None else (p.data_ptr(), p.stride(0), DTYPE_CODES[p.dtype]))
            for layer in zip(*inputs, grads, strict=True):
                for tensor in layer:
                    words.extend(_NO_HEADS if tensor is None else _heads(tensor))
            self._run(words)
        return loss, [g for g in (*grads, *shared) if g is not None]

    def soft_cross_entropy(
        self, student: Tensor, teacher: Tensor, temperature: float, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]:
        loss = torch.zeros((), dtype=torch.float32)
        grads = [torch.empty_like(student, memory_format=torch.contiguous_format)] if gradient else []
        if student.numel():
            classes = student.shape[-1]
            flat = [x.reshape(-1, classes).contiguous() for x in (student, teacher)]
            words = self._words(_SOFT, torch.float32, loss.data_ptr(), flat[0].shape[0], classes)
            for x in flat:
                words.extend((x.data_ptr(), classes, DTYPE_CODES[x.dtype]))
            words.extend((grads[0].data_ptr(), classes, DTYPE_CODES[student.dtype]) if gradient else _NO_VIEW)
            self._run(words, temperature)
        return loss, grads

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p_drop: float, seed: Tensor | None,
        q_t: Tensor | None, k_t: Tensor | None, scale_t: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        batch, heads, length, width = q.shape
        context = q.new_empty((batch, length, heads, width))
        lse = q.new_empty((batch, heads, length), dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32)
        if q.numel():
            inputs = _attention_inputs(q, k, v, q_t, k_t)
            mask = mask.contiguous()
            words = self._attention_words(_ATTEND, inputs, mask, (loss, lse, None), context, p_drop, seed)
            self._run(words, scale, scale_t, _drop_scale(p_drop))
        return context, lse, loss

    def attention_backward(
        self, grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Tensor,
        lse: Tensor, scale: float, p_drop: float, seed: Tensor | None, q_t: Tensor | None, k_t: Tensor | None,
        scale_t: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        grads = [gradient_like(x) for x in (q, k, v)]
        if q.numel():
            inputs = _attention_inputs(q, k, v, q_t, k_t)
            grad_context, mask = _rows_contiguous(grad_context), mask.contiguous()
            own = grad_loss.float().contiguous()
            words = self._attention_words(_ATTEND_BACKWARD, inputs, mask, (None, lse, own), context, p_drop, seed)
            for x in (grad_context.transpose(1, 2), *grads):
                words.extend(_heads(x))
            self._run(words, scale, scale_t, _drop_scale(p_drop))
        return grads[0], grads[1], grads[2]

    def linear(
        self, x: Tensor, weights: Tensors, biases: Tensors, residual: Tensor | None, norm: Tensors, eps: float
    ) -> list[Tensor]:  # fmt: skip
        """See `kernels.attention.linear.linear_fwd`; x and the residual have two dimensions."""
        outs = [x.new_empty((x.shape[0], w.shape[0])) for w in weights]
        if x.shape[0]:
            isa = self._isa[x.dtype]
            packed = self._packed.find(weights, isa, x.shape[0])  # held until the call is done
            words = self._words(_LINEAR, x.dtype, *x.shape, len(weights))
            for t in (x, residual, *(norm or (None, None))):
                words.extend(_NO_VIEW if t is None else _view(t))
            for weight, bias, out, kept in zip(weights, biases, outs, packed, strict=True):
                words.extend((*_view(weight), *_view(bias), *_view(out), weight.shape[0]))
                words.append(0 if kept is None else kept.data_ptr())
            self._run(words, eps)
        return outs

    def _attention_words(
        self, operation: int, inputs: Sequence[Tensor | None], mask: Tensor, scalars: tuple[Tensor | None, ...],
        context: Tensor, p_drop: float, seed: Tensor | None,
    ) -> array[int]:  # fmt: skip
        q, q_t = inputs[0], inputs[3]
        assert q is not None
        given = [t for t in inputs if t is not None]
        words = self._words(operation, _common_dtype(*given), *(0 if t is None else t.data_ptr() for t in scalars))
        words.extend(_mask(mask))
        words.extend((q.shape[1], q.shape[3], 0 if q_t is None else q_t.shape[3]))
        words.extend((0 if seed is None else int(seed), drop_threshold(p_drop)))
        for x in (*inputs, context.transpose(1, 2)):
            words.extend(_NO_HEADS if x is None else _heads(x))
        return words

    def _words(self, operation: int, dtype: torch.dtype, *rest: int) -> array[int]:
        return array("q", (self._abi, operation, self._isa[dtype], *rest))

    def _run(self, words: array[int], *reals: float) -> None:
        values = array("d", reals or (0.0,))
        status = self._call(words.buffer_info()[0], values.buffer_info()[0])
        if status:
            raise RuntimeError(f"ffnas cpu backend: {_ERRORS.get(status, f'status {status}')}")


def _common_dtype(*tensors: Tensor) -> torch.dtype:
    """bfloat16 where all are, else float32."""
    return torch.bfloat16 if all(t.dtype == torch.bfloat16 for t in tensors) else torch.float32


def _view(t: Tensor) -> tuple[int, int, int]:
    return t.data_ptr(), t.stride(0), DTYPE_CODES[t.dtype]


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _attention_inputs(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else _rows_contiguous(t) for t in tensors]


def _heads(x: Tensor) -> tuple[int, int, int, int, int]:
    """[B, heads, S, d] or [B, S, d]."""
    strides = x.stride()
    head = strides[1] if x.ndim == 4 else 0
    return x.data_ptr(), strides[0], head, strides[-2], DTYPE_CODES[x.dtype]


def _mask(mask: Tensor) -> tuple[int, int, int]:
    return mask.data_ptr(), mask.shape[0], mask.shape[1]


def _drop_scale(p: float) -> float:
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)
