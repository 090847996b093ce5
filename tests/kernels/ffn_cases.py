"""Random FFN bodies, tensors and error measures shared by the tests of programs and of the op."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch

from kernels.language.expression import Expression, X, apply, linear, parse_expression
from kernels.language.lowering import load_program, lower
from kernels.language.operators import BINARY, OPERATORS, UNARY
from kernels.language.program import DUAL, FIRST_INSTRUCTION, GRADIENT, INSTRUCTION_WORDS, PAIR, Program
from kernels.reference.ffn import evaluate_subtree

RELEASED = (
    "tanh(linear(gelu(linear(x,wb1)),wb2))",
    "elu(linear(gelu(linear(x,wb1)),wb2))",
    "sigmoid(linear(relu(linear(x,wb1)),wb2))",
    "linear(gelu(linear(max(x,tanh(x)),wb1)),wb2)",
    "linear(relu(mul(linear(x,wb1),x)),wb2)",
    "leaky_relu(linear(gelu(linear(x,wb1)),wb2))",
)
"""The expressions of the released EfficientBERT."""


@dataclass(frozen=True)
class Case:
    expression: Expression
    policy: str
    tokens: int
    hidden: int
    inner: int

    def __str__(self) -> str:
        return f"{self.expression} {self.policy} T={self.tokens} H={self.hidden} d={self.inner}"


def random_tree(rng: Random, depth: int) -> Expression:
    """A tree over x alone."""
    if depth == 0 or rng.random() < 0.35:
        return X
    if rng.random() < 0.5:
        return apply(rng.choice(UNARY), random_tree(rng, depth - 1))
    return apply(rng.choice(BINARY), random_tree(rng, depth - 1), random_tree(rng, depth - 1))


def wrap(rng: Random, core: Expression, times: int, with_x: bool) -> Expression:
    """Operators around `core`, binary ones with trees over x where `with_x`."""
    for _ in range(times):
        if with_x and rng.random() < 0.5:
            operands = [core, random_tree(rng, 2)]
            rng.shuffle(operands)
            core = apply(rng.choice(BINARY), *operands)
        else:
            core = apply(rng.choice(UNARY), core)
    return core


def random_case(rng: Random, sizes: tuple[int, ...], tokens: tuple[int, ...]) -> Case:
    """A valid body at random odd sizes: serial or parallel, either policy, d below, equal to or above H."""
    hidden, inner = rng.choice(sizes), rng.choice(sizes)
    policy = rng.choice(("truncate", "pad"))
    if rng.random() < 0.2:
        left = wrap(rng, linear(random_tree(rng, 2), "wb1"), rng.randint(0, 2), True)
        right = wrap(rng, linear(random_tree(rng, 2), "wb2"), rng.randint(0, 2), True)
        body = wrap(rng, apply(rng.choice(BINARY), left, right), rng.randint(0, 1), True)
        return Case(body, policy, rng.choice(tokens), hidden, hidden)
    mixes = inner <= hidden if policy == "truncate" else inner >= hidden
    mid = wrap(rng, linear(random_tree(rng, 2), "wb1"), rng.randint(0, 3), mixes)
    body = wrap(rng, linear(mid, "wb2"), rng.randint(0, 2), True)
    return Case(body, policy, rng.choice(tokens), hidden, inner)


def with_operator(program: Program, name: str, instead_of: str) -> Program:
    """The program with every instruction of one unary operator turned into another's: value, gradient, dual and pair.

    So that instructions occur which no expression lowers to, such as those of `identity`.
    """
    old, new = OPERATORS[instead_of].opcode, OPERATORS[name].opcode
    words = list(program.words)
    for at in range(FIRST_INSTRUCTION, len(words), INSTRUCTION_WORDS):
        opcode = words[at] & 0xFF
        for offset in (0, GRADIENT, DUAL, PAIR):
            if opcode == old + offset:
                words[at] += new - old
    return load_program(torch.tensor(words, dtype=torch.int32))


ALL_KINDS = "mul({op}(linear({op}(mul({op}(linear(x,wb1)),x)),wb2)),x)"
"""Lowers to the value, gradient, dual and pair instructions of a smooth unary operator."""


def identity_case() -> tuple[Case, Program]:
    """A case with `identity`, and a program that keeps all kinds of its instructions (lowering leaves it out)."""
    program = with_operator(lower(ALL_KINDS.format(op="swish")), "identity", instead_of="swish")
    return Case(parse_expression(ALL_KINDS.format(op="identity")), "truncate", 33, 45, 31), program


def tensors(case: Case, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """x, w1, b1, w2, b2, ln_weight, ln_bias: leaves that require grad, values representable in `dtype`."""
    g = torch.Generator().manual_seed(seed)
    h, d = case.hidden, case.inner
    shapes = [(case.tokens, h), (d, h), (d,), (h, d), (h,), (h,), (h,)]
    scales = [1.0, h**-0.5, 0.5, d**-0.5, 0.5, 0.3, 0.3]
    values = [torch.randn(s, generator=g, dtype=torch.float64) * k for s, k in zip(shapes, scales, strict=True)]
    values[5] = values[5] + 1.0
    return [v.to(dtype).requires_grad_() for v in values]


def with_gradients(function, inputs, weight):
    """(value, *gradients of sum(value * weight)) in float64; gradients of unused inputs are zeros."""
    out = function(*inputs)
    grads = torch.autograd.grad(out, inputs, weight.to(out.dtype), allow_unused=True)
    grads = [torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)]
    return [t.detach().double() for t in (out, *grads)]


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error relative to the root mean square of `exact`.

    Not the largest error: near a kink of relu or max a rounding decides on which side one element falls, and two
    correct implementations differ there by the whole jump.
    """
    if exact.numel() == 0:
        return 0.0
    scale = exact.square().mean().sqrt()
    return float((value.detach() - exact).square().mean().sqrt() / scale.clamp_min(1e-30))


KINKED = frozenset(("relu", "leaky_relu", "max"))


def has_kink(expression: Expression) -> bool:
    return any(e.op in KINKED for e in expression.walk())


def undecided_rows(case: Case, inputs: list[torch.Tensor], tolerance: float = 1e-5) -> torch.Tensor:
    """bool [T]: rows in which some relu, leaky_relu or max has an operand so near its kink that float32 cannot decide.

    An operand exactly at the kink is decided: it comes from two equal values, or from the zeros of a relu.
    """
    x, w1, b1, w2, b2 = (t.detach().double() for t in inputs[:5])
    weights = {"wb1": (w1, b1), "wb2": (w2, b2)}
    undecided = torch.zeros(case.tokens, dtype=torch.bool)
    for node in case.expression.walk():
        if node.op in KINKED:
            operands = [evaluate_subtree(a, x, weights, case.policy) for a in node.args]
            if len(operands) == 2:
                width = min(a.shape[-1] for a in operands)
                operands = [operands[0][:, :width] - operands[1][:, :width]]
            distance = operands[0].abs()
            near = (distance > 0) & (distance < tolerance * distance.max())
            undecided |= near.any(-1)
    return undecided


def perturbed(inputs: list[torch.Tensor], unit: float, seed: int) -> list[torch.Tensor]:
    """float64 leaves: the inputs, each element off by a random factor within 1 +- unit."""
    g = torch.Generator().manual_seed(seed)
    return [
        (t.detach().double() * (1 + unit * (2 * torch.rand(t.shape, generator=g, dtype=torch.float64) - 1)))
        .requires_grad_()
        for t in inputs
    ]  # fmt: skip
