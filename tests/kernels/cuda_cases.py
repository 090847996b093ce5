"""Calls of the FFN op and their exact answers, shared by the tests of the CUDA kernels.

The rule for a value or gradient a of one call, with exact value e (float64 reference on the same inputs), eager
PyTorch's value b at the tested dtype, and p the exact value for inputs that are off by one rounding:

    error(a) <= 2 error(b) + 4 error(p) + 8 UNIT

as in test_ffn.py, which explains it; error() is root mean square, relative.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ffn_cases import error, perturbed

from kernels.call import FFNCall
from kernels.language.expression import parse_expression
from kernels.language.lowering import lower
from kernels.reference import ffn as reference
from kernels.reference.philox import dropout

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Twice the largest relative error of one rounding in float16 and bfloat16, whose results are rounded once more."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_IDS = ("fp32", "bf16", "fp16")


@dataclass
class Stack:
    """n FFNs with one expression, an input, and a gradient of the output."""

    text: str
    policy: str
    call: FFNCall
    grad_out: torch.Tensor

    @property
    def inputs(self) -> list[torch.Tensor]:
        return [self.call.x, *self.call.parameters]

    def names(self) -> list[str]:
        n = self.call.layers
        groups = ("w1", "b1", "w2", "b2", "ln_weight", "ln_bias")[: (len(self.inputs) - 1) // n]
        return ["out", "x", *(f"{name}[{k}]" for name in groups for k in range(n))]


def stack(
    text: str, tokens: int, hidden: int, inner: int, n: int = 1, *, dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None, policy: str = "truncate", p_drop: float = 0.0, layer_norm: bool = True,
    seed: int = 0, strided: bool = True,
) -> Stack:  # fmt: skip
    """Random tensors; with `strided` the weights are views of wider ones, whose rows start anywhere."""
    g = torch.Generator().manual_seed(seed)
    more = (2, 3) if strided else (0, 0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=g) * scale).to(dtype)

    program = lower(text, policy)
    groups = (
        [draw(inner + more[0], hidden + more[1], scale=hidden**-0.5)[:inner, :hidden] for _ in range(n)],
        [draw(inner, scale=0.5) for _ in range(n)],
        [draw(hidden + more[0], inner + more[1], scale=inner**-0.5)[:hidden, :inner] for _ in range(n)],
        [draw(hidden, scale=0.5) for _ in range(n)],
        [1 + draw(hidden, scale=0.3) for _ in range(n)] if layer_norm else [],
        [draw(hidden, scale=0.3) for _ in range(n)] if layer_norm else [],
    )
    drop_seed = torch.tensor([0x1234567890 + seed]) if p_drop else None
    x, compute = draw(tokens, hidden), compute or dtype
    call = FFNCall(x, *groups, program.tensor, int(program.flags), p_drop, drop_seed, 1e-12, compute)
    return Stack(text, policy, call, draw(tokens, hidden))


def answers(s: Stack, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """(out, gradients of x and the parameters) by the plain-PyTorch reference, in the dtype of `leaves`."""
    n, call = s.call.layers, s.call
    z, *rest = leaves
    groups = [rest[k : k + n] for k in range(0, len(rest), n)]
    expression = parse_expression(s.text)
    for layer in range(n):
        value = reference.evaluate(expression, z, *(group[layer] for group in groups[:4]), s.policy)
        if call.has_ln:
            value = dropout(value, call.p_drop, int(call.seed) if call.p_drop else 0, stream=layer)
            value = torch.nn.functional.layer_norm(
                z + value, (call.hidden,), groups[4][layer], groups[5][layer], call.eps
            )
        z = value
    gradients = torch.autograd.grad(z, leaves, s.grad_out.to(z.dtype), allow_unused=True)
    return [z.detach(), *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True))]


def complaints(s: Stack, own: list[torch.Tensor]) -> list[str]:
    """Where (out, *gradients) break the rule above; nothing to say about results that eager makes infinite."""
    unit = UNIT[s.call.compute_dtype]
    exact = answers(s, [t.detach().double().requires_grad_() for t in s.inputs])
    off = answers(s, perturbed(s.inputs, unit, 1))
    # eager at the products' dtype: under autocast its products, activations and their gradients are
    eager = answers(s, [t.detach().to(s.call.compute_dtype).clone().requires_grad_() for t in s.inputs])
    found = []
    for name, a, b, p, e in zip(s.names(), own, eager, off, exact, strict=True):
        bound = 2 * error(b.double(), e) + 4 * error(p, e) + 8 * unit
        mine = error(a.double(), e)
        if not mine <= bound:
            found.append(f"{s.text} {name}: {mine:.2e} > {bound:.2e}")
    return found
