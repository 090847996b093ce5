"""Every operator of the table, by name, on every backend, value and gradient, against float64.

What an operator is stands in `DEFINITIONS`, written from its publication: the table is checked against them, and the
backends against a float64 FFN made of the table's values, whose gradients are autograd's. Each expression has all kinds
of the operator's instructions in it (value, gradient, dual, pair). The rule for accuracy is that of `test_ffn`: root
mean square error <= 2 error(eager) + 4 error(one rounding of the inputs) + 8 units.

Triton's interpreter needs a process of its own: here one test runs this file again with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cuda_emulation import emulation_path
from ffn_cases import (
    ALL_KINDS,
    error,
    identity_case,
    perturbed,
    tensors,
    undecided_rows,
    with_gradients,
)
from triton_places import INTERPRETER, passes_under_the_interpreter

from kernels import dispatch, generate_header
from kernels.build import find_compiler, run_compiler, source_folder
from kernels.call import FFNCall
from kernels.cuda import library
from kernels.dispatch import use_backend
from kernels.ffn.ops import fused_ffn
from kernels.language import operators
from kernels.language.expression import ExpressionError, parse_expression
from kernels.language.lowering import load_program, lower
from kernels.language.operators import BINARY, OPERATORS, UNARY, Operator
from kernels.language.program import FIRST_INSTRUCTION
from kernels.language.validation import mark_valid
from kernels.reference.ffn import ffn

BACKENDS = ("reference", "cpu", "cuda", "triton, interpreting", "triton, generated code")
UNIT = 2.0**-24
NAMES = ("out", "x", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")
BOTH_SIDES = "mul({op}(linear({op}({op}(linear(x,wb1),x),tanh(x)),wb2),x),x)"
"""A binary operator in mid and post, with operands of products and of x."""


def _cdf(a: float) -> float:
    return 0.5 * math.erfc(-a / math.sqrt(2.0))


DEFINITIONS = {
    "gelu": lambda a: 0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "sigmoid": lambda a: 1 / (1 + math.exp(-a)),
    "tanh": math.tanh,
    "relu": lambda a: max(a, 0.0),
    "leaky_relu": lambda a: a if a > 0 else 0.01 * a,
    "elu": lambda a: a if a > 0 else math.expm1(a),
    "swish": lambda a: a / (1 + math.exp(-a)),
    "gelu_erf": lambda a: a * _cdf(a),
    "relu2": lambda a: max(a, 0.0) ** 2,
    "softplus": lambda a: math.log1p(math.exp(-abs(a))) + max(a, 0.0),
    "identity": lambda a: a,
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": max,
}
POINTS = [-30.0, -7.3, -2.0, -0.6, -1e-3, 1e-3, 0.4, 1.0, 3.7, 19.0, 25.0]


@pytest.mark.parametrize("name", UNARY)
def test_the_table_holds_what_an_operator_is(name):
    row, a = OPERATORS[name], torch.tensor(POINTS, dtype=torch.float64)
    exact = torch.tensor([DEFINITIONS[name](p) for p in POINTS], dtype=torch.float64)
    torch.testing.assert_close(row.forward(a), exact, rtol=1e-12, atol=1e-8)  # softplus: e^-20 above its threshold
    step = 1e-6
    slopes = [(DEFINITIONS[name](p + step) - DEFINITIONS[name](p - step)) / (2 * step) for p in POINTS]
    gradient = row.gradient(a, torch.full_like(a, 3.0))
    torch.testing.assert_close(gradient, 3 * torch.tensor(slopes, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BINARY)
def test_the_table_holds_what_a_binary_operator_is(name):
    row = OPERATORS[name]
    a, b = torch.meshgrid(*2 * [torch.tensor(POINTS, dtype=torch.float64)], indexing="ij")
    exact = [[DEFINITIONS[name](p, q) for q in POINTS] for p in POINTS]
    torch.testing.assert_close(row.forward(a, b), torch.tensor(exact, dtype=torch.float64))
    torch.testing.assert_close(row.forward(a, torch.full_like(a, row.identity)), a)


@pytest.fixture
def on(request, monkeypatch):
    """Demands the backend of the parameter; its kernels must serve or the test fails."""
    backend = request.param
    if backend.startswith("triton") != INTERPRETER:
        pytest.skip("runs in the child process" if not INTERPRETER else "runs in the parent process")
    if backend == "cuda":
        monkeypatch.setenv("FFNAS_CUDA_ROUTE", "stack")
        monkeypatch.setattr(dispatch, "_loaded", {k: v for k, v in dispatch._loaded.items() if k != "cuda"})
        with library.emulated(emulation_path()), use_backend("cuda", strict=True):
            yield
        return
    monkeypatch.setenv("FFNAS_SPECIALIZE", "always" if backend.endswith("code") else "0")
    with use_backend(backend.split(",")[0], strict=True):
        yield


@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
def test_under_tritons_interpreter():
    passes_under_the_interpreter(__file__)


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
@pytest.mark.parametrize("on", BACKENDS, indirect=True)
def test_value_and_gradients_on_every_backend(on, name):
    case, program = identity_case()
    case = replace(case, tokens=19, hidden=21, inner=18)
    if name != "identity":
        text = (ALL_KINDS if OPERATORS[name].arity == 1 else BOTH_SIDES).format(op=name)
        case = replace(case, expression=parse_expression(text))
        program = lower(case.expression)
    _check(case, program)


def _check(case, program):
    inputs = tensors(case, 3, torch.float32)
    weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(0))
    weight[undecided_rows(case, inputs)] = 0.0  # a rounding decides on which side of a kink they lie
    own = with_gradients(lambda *i: fused_ffn(*i, program), inputs, weight)
    exact, off, eager = (
        with_gradients(lambda *i: ffn(*i, case.expression), leaves, weight)
        for leaves in (perturbed(inputs, 0.0, 3), perturbed(inputs, UNIT, 3), inputs)
    )
    for what, a, b, p, e in zip(NAMES, own, eager, off, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e) + 4 * error(p, e) + 8 * UNIT, what


def test_every_operator_has_a_definition_here():
    assert set(DEFINITIONS) == set(OPERATORS)


NEW = Operator("cube", 1, 47, lambda a: a**3, lambda a, g: 3 * a * a * g)
"""An operator that no kernel has."""


@pytest.fixture
def with_cube(monkeypatch):
    """The table with a row more, as it would be had somebody added the row and nothing else."""
    monkeypatch.setattr(generate_header, "OPERATORS", {**OPERATORS, "cube": NEW})
    return NEW


def unknown_words():
    """A program with opcode 47, as a later version might write it."""
    words = list(lower("linear(gelu(linear(x,wb1)),wb2)").words)
    words[FIRST_INSTRUCTION] += NEW.opcode - OPERATORS["gelu"].opcode
    return tuple(words)


def test_an_opcode_the_table_does_not_have_is_refused():
    with pytest.raises(ExpressionError, match="unknown opcode 47"):
        load_program(torch.tensor(unknown_words(), dtype=torch.int32))


def test_cpp_kernels_refuse_an_unknown_opcode_that_passed_for_valid():
    backend, words = dispatch.load_backend("cpu"), unknown_words()
    if isinstance(backend, str):
        pytest.skip(backend)
    program, x = torch.tensor(words, dtype=torch.int32), torch.zeros(2, 3)
    mark_valid(program, words)
    vectors = [torch.zeros(3)]
    weights = [torch.zeros(3, 3)]
    call = FFNCall(x, weights, vectors, weights, vectors, [], [], program, 0, 0.0, None, 0.0, x.dtype)
    with pytest.raises(RuntimeError, match="the program is not valid"):
        backend.forward(call, False)


def test_microcode_has_no_operation_for_an_unknown_opcode():
    from kernels.triton import microcode

    with pytest.raises(ExpressionError, match="opcode 47 has no operation"):
        microcode._operation(microcode._Operation(47, (0,), (4,)))


def test_cpp_kernels_do_not_compile_without_an_operators_mathematics(with_cube, tmp_path):
    compiler, sources = find_compiler(), source_folder()
    if compiler is None or sources is None:
        pytest.skip("no C++ compiler, or no sources")
    flag = generate_header.write(tmp_path)
    command = [compiler, "-std=c++17", "-fsyntax-only", flag, str(sources / "cpu" / "kernels_generic.cpp")]
    assert "Cube" in str(run_compiler(command))


def test_triton_kernels_do_not_import_without_an_operators_mathematics():
    pytest.importorskip("triton")
    from kernels.triton import branches

    assert "f = tanh(a)" in branches.source([OPERATORS["tanh"]])
    with pytest.raises(ImportError, match="has no cube, cube_dual"):
        branches.source([OPERATORS["tanh"], NEW])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (replace(NEW, opcode=48), "opcode 48 is outside 16..47"),
        (replace(NEW, gradient=None), "unary operators have a gradient"),
        (replace(NEW, opcode=16), "one opcode"),
        (replace(NEW, name="gelu"), "one name"),
    ],
)
def test_rows_that_cannot_be_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        operators._checked((*OPERATORS.values(), row))
