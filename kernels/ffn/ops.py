"""The fused FFN op: `fused_ffn` and its stack form `fused_ffn_stack`.

    fused_ffn(x)       = LayerNorm(x + dropout(expression(x)))           (bare: expression(x))
    fused_ffn_stack(x) = n of them in one call, with one expression and n sets of weights

Any expression runs on kernels compiled beforehand; a never-seen one costs its lowering (about a millisecond, cached).
The operators below are `kernels.ffn.registration`'s `ffnas::ffn_fwd` and `ffnas::ffn_bwd`; these functions resolve the
program, flatten leading dimensions and draw the dropout seed. They are traceable by `torch.compile(fullgraph=True)`.

Rejected: methods on a module only. Weight-sharing networks call the op with views of weights that belong elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.dispatch import choice_number
from kernels.ffn import kron
from kernels.ffn.kron import KronWeight, Weight, whole
from kernels.ffn.registration import call_forward, trace_tag
from kernels.language.expression import Expression
from kernels.language.lowering import lower
from kernels.language.program import Program

ProgramLike = str | Expression | Program


def fused_ffn(
    x: Tensor,
    w1: Weight,
    b1: Tensor,
    w2: Weight,
    b2: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    program: ProgramLike,
    *,
    policy: str = "truncate",
    p_drop: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-12,
    return_ln: bool = True,
) -> Tensor:
    """`LayerNorm(x + dropout(program(x)))`, or the bare `program(x)` with `return_ln=False`.

    Args:
        x: [..., H], float32, bfloat16, float16 or float64; any strides.
        w1, b1: [d, H] and [d], `nn.Linear` layout; may be strided views (last stride 1) of wider weights. Either weight
            may be a `kernels.ffn.kron.KronWeight`, two factors in place of their Kronecker product.
        w2, b2: [H, d] and [H].
        ln_weight, ln_bias: [H]; may be None with `return_ln=False`.
        program: expression text, a `kernels.Expression` or a lowered `kernels.Program` (which has its own policy).
        policy: width policy of binary operators, "truncate" or "pad".
        p_drop: probability of dropping an element of the expression's value.
        seed: 64-bit dropout seed, an int or an int64 tensor of one element on x's device; None draws one from torch's
            default generator of that device. The mask is that of `kernels.reference.philox`.
        eps: LayerNorm's epsilon.

    Returns:
        [..., H], the dtype of x. Differentiable (once) in x and all parameters.

    Raises:
        ExpressionError: `program` is not an expression, or not valid at these widths.
        ValueError: a tensor of the wrong shape, dtype, device or stride, or wrong dropout arguments; the argument is
            named.
    """
    norms = ([], []) if not return_ln else ([_given(ln_weight, "ln_weight")], [_given(ln_bias, "ln_bias")])
    return fused_ffn_stack(x, [w1], [b1], [w2], [b2], *norms, program, policy=policy, p_drop=p_drop, seed=seed, eps=eps)


def fused_ffn_stack(
    x: Tensor,
    w1: Sequence[Weight],
    b1: Sequence[Tensor],
    w2: Sequence[Weight],
    b2: Sequence[Tensor],
    ln_weight: Sequence[Tensor],
    ln_bias: Sequence[Tensor],
    program: ProgramLike,
    *,
    policy: str = "truncate",
    p_drop: float = 0.0,
    seed: int | Tensor | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """n FFNs one after the other, in one call; a block of rows passes through all of them while it is in cache.

    Args, errors and result are those of `fused_ffn`, with n tensors for each parameter. Empty `ln_weight` and `ln_bias`
    give the bare expression n times. Layer l drops with stream l of the seed (`kernels.reference.philox`).
    """
    code, flags = _program_of(program, policy)
    if torch.compiler.is_compiling():
        flags |= trace_tag()
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    if any(isinstance(w, KronWeight) for w in (*w1, *w2)):
        if takes_factored_route(x, w1, w2):
            rows = x.reshape(-1, x.shape[-1])
            dtype = autocast_dtype(x) or x.dtype
            call = kron.Call(rows, w1, b1, w2, b2, ln_weight, ln_bias, code, float(p_drop), seed, float(eps), dtype)
            return kron.run_factored(call).view(x.shape)
        w1, w2 = [whole(w) for w in w1], [whole(w) for w in w2]
    dropout = p_drop != 0.0
    drawn = _seed_tensor(x, seed) if dropout else None
    parameters = (list(w1), list(b1), list(w2), list(b2), list(ln_weight), list(ln_bias))
    traced = not torch.compiler.is_compiling() and torch._C._is_tracing()  # run with gradients and without
    save = not traced and torch.is_grad_enabled()
    save = save and (x.requires_grad or any(t.requires_grad for group in parameters for t in group))
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    out = call_forward(rows, *parameters, code, flags, float(p_drop), drawn, float(eps), save)
    return out.view(x.shape) if x.dim() != 2 else out


def takes_factored_route(x: Tensor, w1: Sequence[Weight], w2: Sequence[Weight]) -> bool:
    """Whether small products are used for Kronecker weights; never where a backend is forced, or under tracing."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not traced and choice_number() == 0 and kron.is_factored(x, w1, w2)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the products if autocast is on, else None."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise ValueError(f"{name} is needed unless return_ln=False")
    return tensor


def _seed_tensor(x: Tensor, seed: int | Tensor | None) -> Tensor:
    """The dropout seed as int64 [1] on x's device."""
    if seed is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        return seed.reshape(1)
    signed = (int(seed) + 2**63) % 2**64 - 2**63
    return torch.full((1,), signed, dtype=torch.int64, device=x.device)


def _program_of(program: ProgramLike, policy: str) -> tuple[Tensor, int]:
    """(program tensor, flags). Under `torch.compile` a text is lowered while tracing, and becomes a constant."""
    if isinstance(program, Program):
        return program.tensor, program.flags
    if torch.compiler.is_compiling():
        return _lowered_tensor(str(program), policy), _lowered_flags(str(program), policy)
    lowered = lower(program, policy)
    return lowered.tensor, lowered.flags


def _lowered_tensor(text: str, policy: str) -> Tensor:
    return lower(text, policy).tensor


def _lowered_flags(text: str, policy: str) -> int:
    return int(lower(text, policy).flags)


for _constant in (_lowered_tensor, _lowered_flags):
    # what torch.compiler.assume_constant_result sets; calling it would import torch._dynamo, which takes seconds
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined, union-attr]
