"""The Triton backend against the float64 reference: under Triton's interpreter, and on a GPU where there is one.

Triton decides when a kernel is defined whether it is interpreted, so the interpreter needs a process of its own:

    TRITON_INTERPRET=1 pytest tests/kernels/test_triton_ffn.py       the interpreter's half of this file
    pytest tests/kernels/test_triton_ffn.py                          runs the same in a child process, as one test
    pytest -m gpu tests/kernels/test_triton_ffn.py                   the same tests on a CUDA device

The rule for accuracy, and why, is that of `test_ffn`: error <= 2 error(eager) + 4 error(one rounding of the inputs) + 8
units, root mean square; small results, and float16 gradients behind a kink, are judged together. bfloat16 runs on a GPU
only: the interpreter computes it wrongly, and the backend refuses it there.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from random import Random

import pytest
import torch
from ffn_cases import (
    ALL_KINDS,
    RELEASED,
    error,
    has_kink,
    identity_case,
    perturbed,
    random_case,
    tensors,
    undecided_rows,
    with_gradients,
)
from triton_places import GPU, INTERPRETER, passes_under_the_interpreter, triton_device  # noqa: F401  a fixture

from kernels.dispatch import BackendError, use_backend
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.language.expression import parse_expression
from kernels.language.lowering import lower
from kernels.reference.ffn import ffn
from kernels.reference.philox import dropout_mask

NAMES = ("out", "x", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-9}
FLOOR = 8
SIZES = (1, 2, 7, 16, 33, 45)
TEXT = "linear(gelu(linear(x,wb1)),wb2)"
PARALLEL = "add(mul(gelu(linear(x,wb1)),x),tanh(linear(sigmoid(x),wb2)))"
MIXED = "tanh(add(linear(relu(mul(linear(max(x,tanh(x)),wb1),x)),wb2),x))"


@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
def test_under_the_interpreter():
    passes_under_the_interpreter(__file__)


def on(device, inputs):
    return [t.detach().to(device).requires_grad_() for t in inputs]


def run(device, function, inputs, weight):
    """(value, *gradients) in float64 on the CPU."""
    return [t.cpu() for t in with_gradients(function, on(device, inputs), weight.to(device))]


def assert_close(own, other, tolerance):
    for k, (a, b) in enumerate(zip(own, other, strict=True)):
        assert error(a, b) <= tolerance, f"{k}: {error(a, b):.1e} > {tolerance:.1e}"


def from_reference(inputs, weight, function):
    with use_backend("reference", strict=True):
        return run(torch.device("cpu"), function, inputs, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_random_expressions(device, dtype):
    """Serial and parallel forms, both width policies, odd sizes, with and without LayerNorm and dropout."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter computes bfloat16 wrongly")
    rng, complaints, pooled = Random(7), [], []
    for seed in range(16 if device.type == "cpu" else 60):
        case = random_case(rng, SIZES if seed else (135, 270), (1, 3, 7, 33))
        with_ln = seed % 4 != 0 and case.hidden > 2
        rest = () if with_ln else (None, None)
        p_drop = 0.25 if with_ln and seed % 3 == 0 else 0.0
        options = {"policy": case.policy, "p_drop": p_drop, "seed": seed, "return_ln": with_ln}
        inputs = tensors(case, seed, dtype)[: 7 if with_ln else 5]
        weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(seed))
        kinked = has_kink(case.expression)
        if kinked:
            weight[undecided_rows(case, inputs)] = 0.0

        def reference(*leaves, rest=rest, case=case, options=options):
            return ffn(*leaves, *rest, case.expression, **options)

        def fused(*leaves, rest=rest, case=case, options=options):
            return fused_ffn(*leaves, *rest, case.expression, **options)

        own = run(device, fused, inputs, weight)
        exact = with_gradients(reference, perturbed(inputs, 0.0, seed), weight)
        off = with_gradients(reference, perturbed(inputs, UNIT[dtype], seed), weight)
        eager = with_gradients(reference, inputs, weight)
        for name, a, b, p, e in zip(NAMES, own, eager, off, exact, strict=False):
            if not (b.isfinite().all() and e.isfinite().all()):
                continue
            mine, bound = error(a, e), 2 * error(b, e) + 4 * error(p, e) + FLOOR * UNIT[dtype]
            jumps = kinked and name != "out" and dtype != torch.float32
            if jumps or case.tokens < 7 or e.numel() < 64:
                pooled.append((min(mine, 1.0), min(bound, 2.0)))
            elif not mine <= bound:
                complaints.append(f"{name}: {mine:.1e} > {bound:.1e}: {case} seed={seed}")
    assert not complaints, "\n".join(complaints)
    mine, bound = (math.sqrt(sum(v[k] ** 2 for v in pooled) / len(pooled)) for k in (0, 1))
    assert mine <= bound


@pytest.mark.parametrize("mode", ["0", "always"], ids=["interpreter tier", "specialized tier"])
@pytest.mark.parametrize("op", ["relu2", "softplus", "identity"])
def test_extra_operators_in_both_tiers(device, op, mode, monkeypatch, tmp_path):
    """Value, gradient, dual and pair forms of each against the float64 reference; the rule is the module's."""
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    monkeypatch.setenv("FFNAS_SPECIALIZE", mode)
    case, program = identity_case()
    if op != "identity":
        case = replace(case, expression=parse_expression(ALL_KINDS.format(op=op)))
        program = lower(case.expression)
    inputs = tensors(case, 3, torch.float32)
    weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(0))
    own = run(device, lambda *i: fused_ffn(*i, program), inputs, weight)
    exact, off, eager = (
        with_gradients(lambda *i: ffn(*i, case.expression), leaves, weight)
        for leaves in (perturbed(inputs, 0.0, 3), perturbed(inputs, UNIT[torch.float32], 3), inputs)
    )
    for name, a, b, p, e in zip(NAMES, own, eager, off, exact, strict=True):
        assert error(a, e) <= 2 * error(b, e) + 4 * error(p, e) + FLOOR * UNIT[torch.float32], name
    assert bool(list(tmp_path.glob("triton/generated/ffnas_generated_*.py"))) == (mode == "always")


@pytest.mark.parametrize("text", [RELEASED[3], PARALLEL, MIXED])
def test_generated_code_gives_the_same_bits(device, text, monkeypatch, tmp_path):
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    case = random_case(Random(1), (33,), (19,))
    inputs = tensors(case, 3, torch.float32)
    weight = torch.randn(19, 33)
    results = []
    for mode in ("0", "always"):
        monkeypatch.setenv("FFNAS_SPECIALIZE", mode)
        results.append(run(device, lambda *i: fused_ffn(*i, text, p_drop=0.25, seed=5), inputs, weight))
    assert list((tmp_path / "triton" / "generated").glob("ffnas_generated_*.py"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout_masks_are_those_of_philox(device):
    """The FFN's value is 1: LayerNorm's output is above 0 exactly where it was kept. Each layer has its own mask."""
    hidden, tokens, p, seed = 45, 7, 0.6, 2**63 - 12345
    zeros, ones = torch.zeros(hidden, device=device), torch.ones(hidden, device=device)
    w = torch.zeros(hidden, hidden, device=device)
    x = torch.zeros(tokens, hidden, device=device)
    out = fused_ffn(x, w, zeros, w, ones, ones, zeros, TEXT, p_drop=p, seed=seed)
    assert torch.equal(out.cpu() > 0, dropout_mask((tokens, hidden), p, seed))
    # a first layer with gamma = beta = 0 gives zeros, so that the second layer's mask stands alone
    two = fused_ffn_stack(
        x, [w] * 2, [zeros] * 2, [w] * 2, [ones] * 2, [zeros, ones], [zeros] * 2, TEXT, p_drop=p, seed=seed
    )
    assert torch.equal(two.cpu() > 0, dropout_mask((tokens, hidden), p, seed, stream=1))


@pytest.mark.parametrize("p_drop", [0.0, 1.0])
def test_dropout_of_nothing_and_of_everything(device, p_drop):
    case = random_case(Random(2), (16,), (5,))
    inputs, weight = tensors(case, 1, torch.float32), torch.randn(5, 16)

    def function(*i):
        return fused_ffn(*i, TEXT, p_drop=p_drop, seed=3)

    assert_close(run(device, function, inputs, weight), from_reference(inputs, weight, function), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("offset", [0, 3])
def test_strided_weights_are_read_in_place(device, offset, dtype):
    """Weights are corners of a supernet's; gradients reach the corner only."""
    hidden, inner, tokens = 33, 13, 9
    g = torch.Generator().manual_seed(0)
    big1, big2 = torch.randn(40, 50, generator=g) * 0.2, torch.randn(40, 50, generator=g) * 0.2
    others = [torch.randn(s, generator=g) for s in ((tokens, hidden), (inner,), (hidden,), (hidden,), (hidden,))]
    weight = torch.randn(tokens, hidden, generator=g)

    def function(x, b1, b2, gamma, beta, w1, w2):
        w1 = w1[offset : offset + inner, offset : offset + hidden]
        w2 = w2[offset : offset + hidden, offset : offset + inner]
        return fused_ffn(x, w1, b1, w2, b2, gamma, beta, MIXED)

    inputs = [t.to(dtype).requires_grad_() for t in (*others, big1, big2)]
    # float16: two correct results differ by roundings of 5e-4 each, and by jumps at the kinks of relu and max
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert_close(run(device, function, inputs, weight), from_reference(inputs, weight, function), tolerance)


@pytest.mark.parametrize("text", [MIXED, PARALLEL])
def test_stack_of_three(device, text):
    inputs, shapes = [], [(33, 33), (33,), (33, 33), (33,), (33,), (33,)]
    g = torch.Generator().manual_seed(4)
    for shape in [(10, 33), *(s for s in shapes for _ in range(3))]:
        inputs.append((torch.randn(shape, generator=g) * (0.2 if len(shape) == 2 else 1.0)).requires_grad_())
    weight = torch.randn(10, 33, generator=g)

    def function(x, *rest):
        return fused_ffn_stack(x, *(list(rest[k : k + 3]) for k in range(0, 18, 3)), text, p_drop=0.1, seed=11)

    assert_close(run(device, function, inputs, weight), from_reference(inputs, weight, function), 1e-4)


@pytest.mark.parametrize("text", [TEXT, PARALLEL])
def test_empty_batch(device, text):
    case = random_case(Random(0), (16,), (0,))
    value, *gradients = run(device, lambda *i: fused_ffn(*i, text), tensors(case, 0, torch.float32), torch.zeros(0, 16))
    assert value.shape == (0, 16)
    assert all(not g.any() for g in gradients)


def test_expanded_input(device):
    """x with row stride 0."""
    inputs = tensors(random_case(Random(0), (33,), (5,)), 0, torch.float32)
    row = inputs[0][:1].detach()
    weight = torch.randn(5, 33)

    def function(row, *rest):
        return fused_ffn(row.expand(5, 33), *rest, MIXED)

    leaves = [row.requires_grad_(), *inputs[1:]]
    assert_close(run(device, function, leaves, weight), from_reference(leaves, weight, function), 1e-5)


@pytest.mark.parametrize(
    "text",
    [
        RELEASED[0],
        RELEASED[2],
        MIXED,
        "swish(linear(elu(linear(x,wb1)),wb2))",
        "leaky_relu(linear(max(linear(x,wb1),x),wb2))",
    ],
)
def test_nan_and_infinity_spread_as_in_the_reference(device, text):
    """One bad element per row; without LayerNorm, which would spread them over the row.

    Not elu as the last operator: its gradient at NaN depends on the vector length in PyTorch on a CPU.
    """
    inputs = tensors(random_case(Random(3), (16,), (6,)), 2, torch.float32)[:5]
    with torch.no_grad():
        for row, bad in enumerate((float("nan"), float("inf"), -float("inf"), 1e30, -1e30)):
            inputs[0][row, row] = bad
        inputs[3][1, 2] = 0.0

    def function(*i):
        return fused_ffn(*i, None, None, text, return_ln=False)

    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    own, other = run(device, function, inputs, weight), from_reference(inputs, weight, function)
    assert torch.equal(own[0].isnan(), other[0].isnan())
    assert torch.equal(own[0].isinf(), other[0].isinf())
    good = other[0].isfinite()
    assert error(own[0][good], other[0][good]) < 1e-5
    for a, b in zip(own[1:], other[1:], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("text", [MIXED, PARALLEL])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (5, 6), (1, 4), (0, 3)], ids=str)
def test_frozen_inputs(device, wanted, text):
    """Only some gradients: the same as with all of them."""
    inputs = tensors(random_case(Random(5), (16,), (7,)), 6, torch.float32)
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(6))
    everything = from_reference(inputs, weight, lambda *i: fused_ffn(*i, text))
    leaves = [t.detach().to(device).requires_grad_(k in wanted) for k, t in enumerate(inputs)]
    out = fused_ffn(*leaves, text)
    gradients = torch.autograd.grad((out * weight.to(device)).sum(), [leaves[k] for k in wanted])
    assert_close([g.double().cpu() for g in gradients], [everything[1 + k] for k in wanted], 1e-5)


def test_autocast(device):
    """float32 tensors, float16 products: weights' gradients stay float32."""
    inputs = tensors(random_case(Random(5), (45,), (33,)), 6, torch.float32)
    weight = torch.randn(33, 45, generator=torch.Generator().manual_seed(6))

    def function(*i):
        with torch.autocast(i[0].device.type, dtype=torch.float16):
            return fused_ffn(*i, RELEASED[3])

    assert_close(run(device, function, inputs, weight), from_reference(inputs, weight, function), 2e-3)
    assert all(t.grad is None for t in inputs)


def test_results_repeat_bit_for_bit(device):
    inputs, weight = tensors(random_case(Random(5), (33,), (40,)), 6, torch.float32), torch.randn(40, 33)
    first, second = (run(device, lambda *i: fused_ffn(*i, MIXED), inputs, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_program_buffer_takes_other_programs_of_its_kind(device):
    from kernels.triton.device_program import ProgramBuffer, device_program

    first, second = lower(TEXT), lower("linear(tanh(linear(x,wb1)),wb2)")
    inputs = [t.detach().to(device) for t in tensors(random_case(Random(5), (16,), (7,)), 6, torch.float32)]
    with ProgramBuffer(first, device) as buffer:
        address = buffer.device_program.code.data_ptr()
        before = fused_ffn(*inputs, first)
        buffer.copy_(second)
        assert buffer.device_program.code.data_ptr() == address
        after = fused_ffn(*inputs, second)
        with pytest.raises(ValueError, match="flags"):
            buffer.copy_(lower(MIXED))
    assert torch.equal(before, fused_ffn(*inputs, first))
    assert torch.equal(after, fused_ffn(*inputs, second))
    assert device_program(first.words, device).code.data_ptr() != address


def test_backward_in_another_thread_reads_the_buffer(device):
    """As autograd does for CUDA tensors: the buffer's block is in the thread of the forward pass."""
    from kernels.triton.device_program import ProgramBuffer

    first, second = lower(TEXT), lower("linear(tanh(linear(x,wb1)),wb2)")
    inputs = on(device, tensors(random_case(Random(5), (45,), (33,)), 6, torch.float32))
    weight = torch.ones(33, 45, device=device)
    with ProgramBuffer(first, device) as buffer:
        out = fused_ffn(*inputs, first)
        buffer.device_program.code.zero_()  # what backward is to read: here a program that does nothing
        with ThreadPoolExecutor(1) as other:
            emptied = other.submit(lambda: torch.autograd.grad(out, inputs, weight)).result()
        buffer.copy_(second)
    own = torch.autograd.grad(fused_ffn(*inputs, first), inputs, weight)
    assert not torch.equal(own[1], emptied[1])


@pytest.mark.skipif(not INTERPRETER, reason="a rule of the interpreter")
def test_bfloat16_is_refused_under_the_interpreter():
    inputs = tensors(random_case(Random(5), (16,), (7,)), 6, torch.bfloat16)
    with use_backend("triton", strict=True), pytest.raises(BackendError, match="bfloat16"):
        fused_ffn(*inputs, TEXT)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("text", [TEXT, PARALLEL])
def test_a_captured_graph_runs_another_program(text):
    from kernels.triton.device_program import ProgramBuffer

    first, second = lower(text), lower(text.replace("gelu", "swish"))
    inputs = [t.detach().cuda() for t in tensors(random_case(Random(5), (45,), (33,)), 6, torch.float32)]
    with use_backend("triton", strict=True), ProgramBuffer(first, "cuda") as buffer:
        fused_ffn(*inputs, first)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused_ffn(*inputs, first)
        buffer.copy_(second)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, fused_ffn(*inputs, second))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
@pytest.mark.parametrize("text", [TEXT, PARALLEL])
def test_a_captured_training_step_runs_another_program(text):
    """Backward is captured in autograd's own thread; it, too, must read the buffer."""
    from kernels.triton.device_program import ProgramBuffer

    first, second = lower(text), lower(text.replace("gelu", "swish"))
    inputs = [
        t.detach().cuda().requires_grad_() for t in tensors(random_case(Random(5), (45,), (33,)), 6, torch.float32)
    ]
    weight = torch.ones(33, 45, device="cuda")
    with use_backend("triton", strict=True), ProgramBuffer(first, "cuda") as buffer:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.autograd.grad(fused_ffn(*inputs, first), inputs, weight)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(fused_ffn(*inputs, first), inputs, weight)
        buffer.copy_(second)
        graph.replay()
        torch.cuda.synchronize()
    with use_backend("triton", strict=True):
        expected = torch.autograd.grad(fused_ffn(*inputs, second), inputs, weight)
    # a buffer's kernels have more slots, hence other blocks: sums over tokens differ by roundings
    assert_close([t.double().cpu() for t in captured], [t.double().cpu() for t in expected], 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA device")
def test_a_never_seen_expression_compiles_nothing():
    from kernels.triton.launch import statistics

    inputs = [t.detach().cuda() for t in tensors(random_case(Random(5), (45,), (33,)), 6, torch.float32)]
    with use_backend("triton", strict=True):
        fused_ffn(*inputs, TEXT)
        before = statistics.variants
        for name in ("tanh", "elu", "swish", "sigmoid"):
            fused_ffn(*inputs, TEXT.replace("gelu", name))
        assert statistics.variants == before
