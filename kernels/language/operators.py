"""The operator table: the single source of every operator of the expression language.

One row per operator gives its name, arity, opcode, value, derivative and padding identity. The reference
(`kernels.reference.ffn`), the lowering (`kernels.language.lowering`), the generated C++ header, the Triton code
generator and the search space all read this table; adding a row here adds the operator everywhere.

Derivatives are given as functions of the operator's *input* (not of its output), so that a backward segment can
recompute them from the values a forward segment reads. At the kink of a piecewise operator they take the value
PyTorch's autograd takes (relu'(0) = 0, leaky_relu'(0) = 0.01, elu'(0) = 1; `max` splits ties in half).

Rejected: describing derivatives symbolically and differentiating expressions as trees. It doubles the number of
operators the kernels must know (cosh, sign, ...) and hides which intermediate a backend has to keep.

Opcodes are appended, never renumbered: a program serialized by an older version means the same, and an older version
refuses a program with an opcode it does not know.

Sources: operators of the search space, EfficientBERT (Dong et al., Findings of EMNLP 2021), section 3.2; GELU in
the tanh form, Hendrycks and Gimpel 2016, equation 2; squared ReLU, So et al. 2021 ("Primer"); softplus, Dugas et al.
2000, in PyTorch's form (the identity above 20).
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
        derivative: unary only; d forward / d input as a function of the input.
        identity: binary only; the value `v` with `op(a, v) == a`, used by the `pad` width policy.
        in_paper: whether the operator belongs to EfficientBERT's search space.
        idempotent: binary only; `op(a, a) == a`.
        cheap: unary only; no transcendental, so that computing value and derivative together saves nothing.
    """

    name: str
    arity: int
    opcode: int
    forward: Callable[..., Any]
    derivative: Callable[..., Any] | None = None
    identity: float | None = None
    in_paper: bool = True
    idempotent: bool = False
    cheap: bool = False


def _torch() -> Any:
    import torch  # deferred: `import kernels` must stay light

    return torch


def _gelu(a: Any) -> Any:
    return _torch().nn.functional.gelu(a, approximate="tanh")


def _gelu_derivative(a: Any) -> Any:
    inner = GELU_TANH_SCALE * (a + GELU_TANH_CUBIC * a * a * a)
    t = _torch().tanh(inner)
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * GELU_TANH_SCALE * (1 + 3 * GELU_TANH_CUBIC * a * a)


def _gelu_erf(a: Any) -> Any:
    return _torch().nn.functional.gelu(a)


def _gelu_erf_derivative(a: Any) -> Any:
    torch = _torch()
    cdf = 0.5 * (1 + torch.erf(a * math.sqrt(0.5)))
    return cdf + a * torch.exp(-0.5 * a * a) * (1.0 / math.sqrt(2.0 * math.pi))


def _sigmoid_derivative(a: Any) -> Any:
    s = _torch().sigmoid(a)
    return s * (1 - s)


def _tanh_derivative(a: Any) -> Any:
    t = _torch().tanh(a)
    return 1 - t * t


def _relu_derivative(a: Any) -> Any:
    return (a > 0).to(a.dtype)


def _leaky_relu_derivative(a: Any) -> Any:
    torch = _torch()
    return torch.where(a > 0, torch.ones_like(a), torch.full_like(a, LEAKY_RELU_SLOPE))


def _elu_derivative(a: Any) -> Any:
    torch = _torch()
    return torch.where(a > 0, torch.ones_like(a), ELU_ALPHA * torch.exp(a))


def _swish_derivative(a: Any) -> Any:
    s = _torch().sigmoid(a)
    return s * (1 + a * (1 - s))


def _relu2(a: Any) -> Any:
    positive = _torch().relu(a)
    return positive * positive


def _softplus_derivative(a: Any) -> Any:
    torch = _torch()
    return torch.where(a > SOFTPLUS_THRESHOLD, torch.ones_like(a), torch.sigmoid(a))


_ROWS = (
    Operator("add", 2, 1, lambda a, b: a + b, identity=0.0),
    Operator("mul", 2, 2, lambda a, b: a * b, identity=1.0),
    Operator("max", 2, 3, lambda a, b: _torch().maximum(a, b), identity=-math.inf, idempotent=True),
    Operator("gelu", 1, 16, _gelu, _gelu_derivative),
    Operator("sigmoid", 1, 17, lambda a: _torch().sigmoid(a), _sigmoid_derivative),
    Operator("tanh", 1, 18, lambda a: _torch().tanh(a), _tanh_derivative),
    Operator("relu", 1, 19, lambda a: _torch().relu(a), _relu_derivative, cheap=True),
    Operator(
        "leaky_relu",
        1,
        20,
        lambda a: _torch().nn.functional.leaky_relu(a, LEAKY_RELU_SLOPE),
        _leaky_relu_derivative,
        cheap=True,
    ),
    Operator("elu", 1, 21, lambda a: _torch().nn.functional.elu(a, ELU_ALPHA), _elu_derivative),
    Operator("swish", 1, 22, lambda a: _torch().nn.functional.silu(a), _swish_derivative),
    Operator("gelu_erf", 1, 23, _gelu_erf, _gelu_erf_derivative, in_paper=False),
    Operator("relu2", 1, 24, _relu2, lambda a: 2 * _torch().relu(a), in_paper=False, cheap=True),
    Operator(
        "softplus",
        1,
        25,
        lambda a: _torch().nn.functional.softplus(a, threshold=SOFTPLUS_THRESHOLD),
        _softplus_derivative,
        in_paper=False,
    ),
    Operator("identity", 1, 26, lambda a: a, lambda a: _torch().ones_like(a), in_paper=False, cheap=True),
)

OPERATORS = MappingProxyType({row.name: row for row in _ROWS})
UNARY = tuple(row.name for row in _ROWS if row.arity == 1)
BINARY = tuple(row.name for row in _ROWS if row.arity == 2)
PAPER_UNARY = tuple(row.name for row in _ROWS if row.arity == 1 and row.in_paper)
PAPER_BINARY = tuple(row.name for row in _ROWS if row.arity == 2 and row.in_paper)
