"""A whole stack of FFNs in one launch: the grouped kernel with one member.

This is the experiment that decides whether one kernel for both products, all layers, dropout and LayerNorm beats
separate products with fused prologues and epilogues (`kernels.triton.ffn`). For it speak no activation written but
what backward needs, and one launch for n layers; against it that each block reads all weights, and 16 to 64 rows a
block. Which one serves a call is the CUDA backend's choice (`kernels.backends.cuda`).

Rejected: a kernel of its own. It would differ from the grouped one in the search for a block's member alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kernels.call import FFNCall
from kernels.cuda import grouped

saved_like = grouped.saved_like


def supports(call: FFNCall) -> str | None:
    """None when the call can be served, else one line saying why not."""
    return grouped.supports([call])


def forward(call: FFNCall, save: bool) -> tuple[Tensor, list[Tensor]]:
    """(out [T, H] contiguous in x.dtype, saved tensors in the order of `saved_like`)."""
    (out,), (saved,) = grouped.forward([call], save)
    return out, saved


def backward(call: FFNCall, grad_out: Tensor, saved: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """Gradients for the inputs with `needs[i]`, in the order x, then `call.parameters`."""
    (gradients,) = grouped.backward([call], [grad_out], [saved], [needs])
    return [g for g in gradients if g is not None]
