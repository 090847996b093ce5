"""What a backend is: the call of the FFN op it is given, and all that is asked of it.

A call is a *stack* of n >= 1 FFNs that share one program and differ in weights, applied one after the other:

    z_0 = x;   z_{l+1} = LayerNorm_l(z_l + dropout_l(expression(z_l; w1_l, b1_l, w2_l, b2_l)));   out = z_n

or, with `has_ln` False, `z_{l+1} = expression(z_l; ...)` with neither dropout nor residual.

A backend `name` lives in `kernels/backends/name.py`, whose `load() -> Backend` is called once, at the first call that
could use it, and raises `BackendUnavailable` (one line: what is missing, how to get it) where it cannot work here. Its
functions write to no input, and what they return shares no memory with any. How to add one: CONTRIBUTING.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor


class BackendUnavailable(RuntimeError):
    """A backend cannot be used on this machine; the message is one line saying why."""


@dataclass(slots=True)
class FFNCall:
    """The arguments of one call, checked: shapes, dtypes, devices and the program are valid.

    Attributes:
        x: [T, H], stride(1) == 1 (any row stride, 0 included); T may be 0.
        w1, b1, w2, b2: n tensors each, [d, H], [d], [H, d], [H]; stride(-1) == 1, rows possibly strided.
        ln_weight, ln_bias: n tensors each, [H]; both empty for bare expressions.
        program: int32 CPU tensor (`kernels.language.program`), validated.
        flags: its `kernels.language.program.Flag` bits, as an int.
        p_drop: probability of zeroing, 0 <= p <= 1. 0 means no dropout (seed is then None); always 0 without LayerNorm.
        seed: int64 [1] tensor on x.device; layer l of the stack uses stream l of that seed
            (`kernels.reference.philox`).
        eps: LayerNorm's epsilon.
        compute_dtype: the dtype matrix-product operands are rounded to; accumulation and elementwise math are float32
            (float64 for float64). Equals x.dtype, except under autocast, where x may be float32 and this bfloat16.
            w1, b1, w2 and b2 are x.dtype, compute_dtype or float32 (all four groups alike), LayerNorm's parameters
            x.dtype or float32: a backend rounds weights as it packs them, and gradients have their input's dtype, so
            that those of float32 weights are never rounded to bfloat16.
    """

    x: Tensor
    w1: Sequence[Tensor]
    b1: Sequence[Tensor]
    w2: Sequence[Tensor]
    b2: Sequence[Tensor]
    ln_weight: Sequence[Tensor]
    ln_bias: Sequence[Tensor]
    program: Tensor
    flags: int
    p_drop: float
    seed: Tensor | None
    eps: float
    compute_dtype: torch.dtype

    @property
    def has_ln(self) -> bool:
        return len(self.ln_weight) > 0

    @property
    def layers(self) -> int:
        return len(self.w1)

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        return self.x.shape[1]

    @property
    def inner(self) -> int:
        return self.w1[0].shape[0]

    @property
    def parameters(self) -> list[Tensor]:
        """w1 * n, b1 * n, w2 * n, b2 * n, ln_weight * n, ln_bias * n."""
        return [*self.w1, *self.b1, *self.w2, *self.b2, *self.ln_weight, *self.ln_bias]


class Backend(Protocol):
    """One implementation; derive from it. `name` is what FFNAS_BACKEND and `use_backend` take."""

    name: str
    tensor_ops: TensorOps | None = None
    """Losses, attention and linear layers; None where it has only FFNs."""

    @property
    def saved_layout(self) -> int:
        """Goes up with every change of what `forward` saves: graphs compiled for another layout are not reused."""
        return 0

    def supports(self, call: FFNCall) -> str | None:
        """None when the call can be served, else one line saying why not.

        Decides from device, dtypes, H, d, n, flags and strides only: never from T or from the values of a tensor, since
        it is also asked with fake tensors while a graph is traced. Cheap: asked on every call.
        """
        ...

    def supports_group(self, calls: Sequence[FFNCall]) -> str | None:
        """None when it can serve the calls in one launch (`kernels.ffn.grouped`), else one line saying why not."""
        return "it serves one call at a time"

    def forward(self, call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
        """(out [T, H] contiguous in x.dtype, tensors saved for `backward`; [] when `save` is False)."""
        ...

    def saved_like(self, call: FFNCall) -> list[Tensor]:
        """Uninitialized tensors (`call.x.new_empty(...)`) of the shapes and dtypes `forward(call, True)` saves."""
        ...

    def backward(
        self,
        call: FFNCall,
        grad_out: Tensor,
        saved: Sequence[Tensor],
        needs: Sequence[bool],
        overwrite: bool = False,
    ) -> list[Tensor]:
        """Gradients for the inputs with `needs[i]`, and only those, in the order x, then `call.parameters`.

        grad_out: [T, H], stride(1) == 1, x.dtype. Each gradient is contiguous, has its input's shape ([d, H] for
        a strided w1, say) and dtype. Dropout masks are generated again from the seed, never stored.
        overwrite: nobody reads `saved` again, so gradients may lie in its memory; a backend need not.
        """
        ...


class TensorOps(Protocol):
    """What a backend has for plain tensors: losses, attention, linear layers.

    Arguments and results are those of the plain PyTorch of the same names in `kernels.reference.losses` and
    `kernels.reference.attention`; of `linear` those of `kernels.attention.linear.linear_fwd`.
    """

    def supports(self, tensors: Sequence[Tensor]) -> str | None:
        """None when calls with these tensors can be served, else one line saying why not."""
        ...

    def score_mse(
        self, q_s: Sequence[Tensor], k_s: Sequence[Tensor], q_t: Sequence[Tensor], k_t: Sequence[Tensor],
        mask: Tensor, scale_s: float, scale_t: float, method: str, tile: int, gradients: bool,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip

    def hidden_mse(
        self, h_s: Sequence[Tensor], fit: Sequence[Tensor], h_t: Sequence[Tensor], mask: Tensor,
        needs: Sequence[bool], compute_dtype: torch.dtype | None,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip

    def soft_cross_entropy(
        self, student: Tensor, teacher: Tensor, temperature: float, gradient: bool
    ) -> tuple[Tensor, list[Tensor]]: ...

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, p_drop: float, seed: Tensor | None,
        q_t: Tensor | None, k_t: Tensor | None, scale_t: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def attention_backward(
        self, grad_context: Tensor, grad_loss: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, context: Tensor,
        lse: Tensor, scale: float, p_drop: float, seed: Tensor | None, q_t: Tensor | None, k_t: Tensor | None,
        scale_t: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip

    def linear(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], residual: Tensor | None,
        norm: Sequence[Tensor], eps: float,
    ) -> list[Tensor]: ...  # fmt: skip
