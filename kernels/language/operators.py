"""The operator table: the single source of every operator of the expression language.

One row per operator gives its name, arity, opcode, value, gradient and padding identity. Reference, lowering, program
format, search space, the C++ and CUDA interpreters and the Triton kernels read it. A new unary operator is one row here
and its mathematics in kernels/triton/elementary.py and csrc/activations.h (CONTRIBUTING.md); what chooses among
operators is generated, so one without its mathematics does not compile, and an unknown opcode is refused.

Gradients are functions of the operator's *input*, so that a backward segment can compute them again. At kinks,
infinities and NaN they are those of PyTorch's autograd. Opcodes are appended, never renumbered (docs/decisions/0001).

Sources: EfficientBERT (Dong et al., Findings of EMNLP 2021), section 3.2; GELU in the tanh form, Hendrycks and Gimpel
2016, equation 2; squared ReLU, So et al. 2021 ("Primer"); softplus, Dugas et al. 2000, the identity above 20.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

LEAF = "x"
LINEAR = "linear"
KRON = "kron"
"""A linear whose weight is a Kronecker product; programs do not tell the two apart (`kernels.ffn.kron`)."""
LINEARS = (LINEAR, KRON)
WEIGHTS = ("wb1", "wb2")

LEAKY_RELU_SLOPE = 0.01
ELU_ALPHA = 1.0
SOFTPLUS_THRESHOLD = 20.0
"""Above it softplus is the identity (PyTorch's default); the difference, e^-20, is below a float32 rounding."""
GELU_TANH_SCALE = math.sqrt(2.0 / math.pi)
GELU_TANH_CUBIC = 0.044715


@dataclass(frozen=True, slots=True)
class Operator:
    """One row of the operator table.

    Attributes:
        name: the operator's name in the text form of an expression.
        arity: number of expression operands (1 or 2).
        opcode: the number that stands for the operator in a program; never reused, never renumbered.
        forward: value; takes and returns `torch.Tensor` of any floating dtype.
        gradient: unary only; (input, incoming gradient) -> f'(input) * incoming gradient, as autograd has it.
        identity: binary only; the value `v` with `op(a, v) == a`, used by the `pad` width policy.
        in_paper: whether the operator belongs to EfficientBERT's search space.
        idempotent: binary only; `op(a, a) == a`.
        cheap: unary only; no transcendental, so that computing value and derivative together saves nothing.
    """

    name: str
    arity: int
    opcode: int
    forward: Callable[..., Any]
    gradient: Callable[[Any, Any], Any] | None = None
    identity: float | None = None
    in_paper: bool = True
    idempotent: bool = False
    cheap: bool = False


def _torch() -> Any:
    import torch  # deferred: `import kernels` must stay light

    return torch


def _aten() -> Any:
    return _torch().ops.aten


def _gelu(a: Any) -> Any:
    return _torch().nn.functional.gelu(a, approximate="tanh")


def _relu2(a: Any) -> Any:
    positive = _torch().relu(a)
    return positive * positive


def _softplus(a: Any) -> Any:
    return _torch().nn.functional.softplus(a, threshold=SOFTPLUS_THRESHOLD)


def _unary(
    name: str, opcode: int, forward: Callable[[Any], Any], gradient: Callable[[Any, Any], Any], **rest: bool
) -> Operator:
    return Operator(name, 1, opcode, forward, gradient, **rest)


_ROWS = (
    Operator("add", 2, 1, lambda a, b: a + b, identity=0.0),
    Operator("mul", 2, 2, lambda a, b: a * b, identity=1.0),
    Operator("max", 2, 3, lambda a, b: _torch().maximum(a, b), identity=-math.inf, idempotent=True),
    _unary("gelu", 16, _gelu, lambda a, g: _aten().gelu_backward(g, a, approximate="tanh")),
    _unary(
        "sigmoid",
        17,
        lambda a: _torch().sigmoid(a),
        lambda a, g: _aten().sigmoid_backward(g, _torch().sigmoid(a)),
    ),
    _unary("tanh", 18, lambda a: _torch().tanh(a), lambda a, g: _aten().tanh_backward(g, _torch().tanh(a))),
    _unary("relu", 19, lambda a: _torch().relu(a), lambda a, g: _aten().threshold_backward(g, a, 0), cheap=True),
    _unary(
        "leaky_relu",
        20,
        lambda a: _torch().nn.functional.leaky_relu(a, LEAKY_RELU_SLOPE),
        lambda a, g: _aten().leaky_relu_backward(g, a, LEAKY_RELU_SLOPE, False),
        cheap=True,
    ),
    _unary(
        "elu",
        21,
        lambda a: _torch().nn.functional.elu(a, ELU_ALPHA),
        lambda a, g: _aten().elu_backward(g, ELU_ALPHA, 1, 1, False, a),
    ),
    _unary("swish", 22, lambda a: _torch().nn.functional.silu(a), lambda a, g: _aten().silu_backward(g, a)),
    _unary(
        "gelu_erf",
        23,
        lambda a: _torch().nn.functional.gelu(a),
        lambda a, g: _aten().gelu_backward(g, a),
        in_paper=False,
    ),
    _unary(
        "relu2",
        24,
        _relu2,
        lambda a, g: _aten().threshold_backward(g * a + g * a, a, 0),
        in_paper=False,
        cheap=True,
    ),
    _unary(
        "softplus",
        25,
        _softplus,
        lambda a, g: _aten().softplus_backward(g, a, 1, SOFTPLUS_THRESHOLD),
        in_paper=False,
    ),
    _unary("identity", 26, lambda a: a, lambda a, g: g, in_paper=False, cheap=True),
)

BINARY_OPCODES = range(1, 16)
"""Opcodes a binary operator may have (`kernels.language.program` lists what the others mean)."""
UNARY_OPCODES = range(16, 48)
"""Opcodes a unary operator may have."""


def _checked(rows: tuple[Operator, ...]) -> MappingProxyType[str, Operator]:
    """The table by name. Raises `ValueError` where a row cannot be told from another, or its opcode is out of range."""
    for row in rows:
        allowed = UNARY_OPCODES if row.arity == 1 else BINARY_OPCODES
        if row.opcode not in allowed:
            raise ValueError(f"operator {row.name}: opcode {row.opcode} is outside {allowed.start}..{allowed.stop - 1}")
        if (row.gradient is None) == (row.arity == 1) or (row.identity is None) == (row.arity == 2):
            raise ValueError(f"operator {row.name}: unary operators have a gradient, binary ones an identity")
    table = {row.name: row for row in rows}
    if len(table) < len(rows) or len({row.opcode for row in rows}) < len(rows):
        raise ValueError("two operators have one name or one opcode")
    return MappingProxyType(table)


OPERATORS = _checked(_ROWS)
UNARY = tuple(row.name for row in _ROWS if row.arity == 1)
BINARY = tuple(row.name for row in _ROWS if row.arity == 2)
PAPER_UNARY = tuple(row.name for row in _ROWS if row.arity == 1 and row.in_paper)
PAPER_BINARY = tuple(row.name for row in _ROWS if row.arity == 2 and row.in_paper)
