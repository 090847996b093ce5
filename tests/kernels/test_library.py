"""The contract of the op: registration, tracing, transforms, autocast, strides, masks, odd inputs, errors."""

from __future__ import annotations

import pytest
import torch
from ffn_cases import Case, error, identity_case, tensors, with_gradients
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from kernels.dispatch import available_backends, use_backend
from kernels.ffn.modules import FusedFFN
from kernels.ffn.ops import fused_ffn, fused_ffn_stack
from kernels.ffn.registration import ffn_bwd, ffn_fwd
from kernels.language.expression import ExpressionError, parse_expression
from kernels.language.lowering import clear_cache, load_program, lower
from kernels.reference.ffn import ffn
from kernels.reference.philox import dropout_mask

TEXT = "tanh(linear(gelu(mul(linear(x,wb1),x)),wb2))"
EXPRESSION = parse_expression(TEXT)
CASE = Case(EXPRESSION, "truncate", 5, 9, 7)
NAMES = ("x", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")

# float32 against float32: another order of summation over widths below 10
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Runs the test on one backend; skips where this machine does not have it."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    torch._dynamo.reset()  # a compiled graph keeps the backend it was traced with
    with use_backend(request.param, strict=True):
        yield request.param


def inputs32(case=CASE, seed=0):
    return tensors(case, seed, torch.float32)


def op_arguments(inputs, *, p_drop=0.0, save=True, stack=1):
    program = lower(TEXT)
    seed = torch.tensor([11]) if p_drop else None
    x, *parameters = inputs
    return (x, *([p] * stack for p in parameters), program.tensor, int(program.flags), p_drop, seed, 1e-12, save)


def plain(*inputs):
    return ffn(*inputs, EXPRESSION)


@pytest.mark.parametrize("p_drop", [0.0, 0.25])
def test_opcheck(backend, p_drop):
    inputs = inputs32()
    forward = op_arguments(inputs, p_drop=p_drop, stack=2)
    torch.library.opcheck(ffn_fwd, forward)
    with torch.no_grad():
        out, saved = ffn_fwd(*forward)
        *common, _ = forward
        detached = [[t.detach() for t in a] if isinstance(a, list) else a for a in common]
        detached[0] = common[0].detach()
        needs = [True] * 13
        torch.library.opcheck(ffn_bwd, (torch.randn_like(out), *detached, None, saved, needs))


@pytest.mark.parametrize("text", [TEXT, "mul(tanh(linear(max(x,tanh(x)),wb1)),max(x,linear(gelu(x),wb2)))"])
@pytest.mark.parametrize("return_ln", [True, False], ids=["ln", "bare"])
def test_gradcheck_in_float64(text, return_ln):
    expression = parse_expression(text)
    inputs = tensors(Case(expression, "truncate", 3, 4, 4), 0)

    def function(*inputs):
        return fused_ffn(*inputs, text, p_drop=0.3 if return_ln else 0.0, seed=5, return_ln=return_ln)

    with use_backend("reference"):
        assert torch.autograd.gradcheck(function, inputs if return_ln else [*inputs[:5], None, None])


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(backend, dynamic):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=dynamic)
    def compiled(*inputs):
        return fused_ffn(*inputs, TEXT, p_drop=0.25) * 2

    for tokens in (5, 8):
        inputs = inputs32(Case(EXPRESSION, "truncate", tokens, 9, 7))
        weight = torch.randn(tokens, 9)
        torch.manual_seed(3)
        own = with_gradients(compiled, inputs, weight)
        torch.manual_seed(3)
        eager = with_gradients(lambda *i: fused_ffn(*i, TEXT, p_drop=0.25) * 2, inputs, weight)
        for a, b in zip(own, eager, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_compiled_graph_keeps_its_backend():
    """What is saved for backward differs between backends, so a graph must not change them between its two halves."""
    compiled = torch.compile(lambda *i: fused_ffn(*i, TEXT), fullgraph=True, backend="aot_eager")
    weight = torch.randn(5, 9)
    results = []
    for name in ("reference", "cpu"):
        with use_backend(name):
            results.append(with_gradients(compiled, inputs32(), weight))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compile_takes_programs_as_data(backend):
    """One compiled graph runs other programs with the same flags without compiling again."""
    compiled_count = 0

    def counting(graph, example_inputs):
        nonlocal compiled_count
        compiled_count += 1
        return graph.forward

    program_a, program_b = lower("linear(gelu(linear(x,wb1)),wb2)"), lower("linear(swish(linear(x,wb1)),wb2)")
    assert program_a.flags == program_b.flags
    x, *parameters = (t.detach() for t in inputs32())

    @torch.compile(fullgraph=True, backend=counting)
    def compiled(x, code):
        flags = int(program_a.flags)
        return ffn_fwd(x, *([p] for p in parameters), code, flags, 0.0, None, 1e-12, False)[0]

    for program, text in ((program_a, "gelu"), (program_b, "swish")):
        expected = ffn(x, *parameters, parse_expression(f"linear({text}(linear(x,wb1)),wb2)"))
        torch.testing.assert_close(compiled(x, program.tensor), expected, **CLOSE)
    assert compiled_count == 1


def test_programs_lowered_under_a_mode_are_real_tensors():
    """The cache serves everybody: what tracing put into it must run afterwards."""
    inputs = [t.detach() for t in inputs32()]
    expected = fused_ffn(*inputs, TEXT)
    for mode in (FakeTensorMode(), torch.inference_mode(), torch.device("meta")):
        clear_cache()
        with mode:
            lower(TEXT)
        assert torch.equal(fused_ffn(*inputs, TEXT), expected)
    clear_cache()
    traced = make_fx(lambda *i: fused_ffn(*i, TEXT))(*inputs)
    assert torch.equal(traced(*inputs), expected)
    exported = torch.export.export(FusedFFN(9, 7, TEXT), (inputs[0],))
    assert any(node.target is ffn_fwd for node in exported.graph.nodes)


def test_meta_tensors_have_shapes():
    inputs = [t.detach().to("meta") for t in inputs32()]
    out = fused_ffn(*inputs, TEXT)
    assert out.device.type == "meta"
    assert out.shape == (5, 9)


def test_func_transforms(backend):
    inputs = [t.detach() for t in inputs32()]

    def loss(*inputs):
        return fused_ffn(*inputs, TEXT).square().sum()

    def plain_loss(*inputs):
        return plain(*inputs).square().sum()

    every = tuple(range(7))
    for own, other in zip(
        torch.func.grad(loss, every)(*inputs), torch.func.grad(plain_loss, every)(*inputs), strict=True
    ):
        torch.testing.assert_close(own, other, **CLOSE)
    batch = torch.randn(3, 5, 9)
    in_dims = (0, *[None] * 6)
    per_sample = torch.vmap(torch.func.grad(loss, every), in_dims)(batch, *inputs[1:])
    expected = torch.vmap(torch.func.grad(plain_loss, every), in_dims)(batch, *inputs[1:])
    for own, other in zip(per_sample, expected, strict=True):
        torch.testing.assert_close(own, other, **CLOSE)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_autocast_rounds_products_and_nothing_else(backend, x_dtype):
    case = Case(parse_expression("linear(gelu(linear(x,wb1)),wb2)"), "truncate", 30, 45, 27)
    inputs = inputs32(case)
    inputs[0] = inputs[0].detach().to(x_dtype).requires_grad_()
    weight = torch.randn(30, 45)
    exact = with_gradients(
        lambda *i: ffn(*i, case.expression), [t.detach().double().requires_grad_() for t in inputs], weight
    )

    def eager(x, w1, b1, w2, b2, g, b):
        return F.layer_norm(
            x + F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2), (45,), g, b, 1e-12
        ).to(x.dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fused_ffn(*inputs, case.expression)
        assert out.dtype == x_dtype
        own = with_gradients(lambda *i: fused_ffn(*i, case.expression), inputs, weight)
        other = with_gradients(eager, inputs, weight)
    for name, a, b, e in zip(("out", *NAMES), own, other, exact, strict=True):
        scale = e.square().mean().sqrt()
        # not more than twice eager autocast's error, plus a quarter of bfloat16's rounding
        assert (a - e).square().mean().sqrt() <= 2 * (b - e).square().mean().sqrt() + scale * 2**-10, name
    gradients = torch.autograd.grad(out.float().sum(), inputs)
    assert [g.dtype for g in gradients] == [t.dtype for t in inputs]


def test_strided_weight_views_are_read_in_place(backend):
    """A subnet of width 7 out of weights stored for width 12."""
    case = Case(EXPRESSION, "truncate", 5, 9, 12)
    x, w1, b1, w2, b2, g, b = inputs32(case)
    views = [x, w1[:7], b1[:7], w2[:, :7], b2, g, b]
    assert not views[3].is_contiguous()
    torch.testing.assert_close(fused_ffn(*views, TEXT), plain(*views), **CLOSE)
    own = torch.autograd.grad(fused_ffn(*views, TEXT).square().sum(), [x, w1, b1, w2])
    other = torch.autograd.grad(plain(*views).square().sum(), [x, w1, b1, w2])
    for a, e in zip(own, other, strict=True):
        torch.testing.assert_close(a, e, **CLOSE)
    assert own[3][:, 7:].count_nonzero() == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.t().contiguous().t(),
        lambda x: x[:1].expand(5, 9),
        lambda x: x[:, :1].expand(5, 9),
        lambda x: torch.cat([x, x], 1)[:, :9],
        lambda x: x.repeat(2, 1)[::2],
    ],
    ids=["transposed", "zero-stride rows", "zero-stride columns", "padded rows", "every other row"],
)
def test_x_of_any_strides(backend, change):
    x, *rest = inputs32()
    own = torch.autograd.grad(fused_ffn(change(x), *rest, TEXT).square().sum(), x)
    expected = torch.autograd.grad(plain(change(x), *rest).square().sum(), x)
    torch.testing.assert_close(own, expected, **CLOSE)


def test_gradients_of_any_strides(backend):
    inputs = inputs32()
    for gradient in (torch.ones(()).expand(5, 9), torch.randn(9, 5).t(), torch.randn(1, 9).expand(5, 9)):
        own = torch.autograd.grad(fused_ffn(*inputs, TEXT), inputs, gradient)
        expected = torch.autograd.grad(plain(*inputs), inputs, gradient)
        for a, e in zip(own, expected, strict=True):
            torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("wanted", [(0,), (1,), (3, 4), (5,), (6,), (2, 6), tuple(range(7))], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_no_other(backend, wanted):
    every = inputs32()
    expected = torch.autograd.grad(plain(*every).square().sum(), every)
    inputs = [t.detach().requires_grad_(k in wanted) for k, t in enumerate(every)]
    fused_ffn(*inputs, TEXT).square().sum().backward()
    for k, t in enumerate(inputs):
        assert (t.grad is not None) == (k in wanted), NAMES[k]
        if t.grad is not None:
            torch.testing.assert_close(t.grad, expected[k], **CLOSE)


@pytest.mark.parametrize("shape", [(0, 9), (1, 9), (9,), (2, 0, 9), (2, 3, 9), (1, 1, 1, 9)], ids=str)
def test_leading_dimensions(backend, shape):
    _, *rest = inputs32()
    x = torch.randn(shape, requires_grad=True)
    out = fused_ffn(x, *rest, TEXT)
    assert out.shape == x.shape
    expected = plain(x, *rest)
    torch.testing.assert_close(out, expected, **CLOSE)
    own = torch.autograd.grad(out.sum(), [x, *rest])
    for a, e in zip(own, torch.autograd.grad(expected.sum(), [x, *rest]), strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_a_stack_is_its_layers_one_after_the_other(backend):
    layers = [inputs32(seed=k)[1:] for k in range(3)]
    x = inputs32()[0]
    leaves = [x, *(t for layer in layers for t in layer)]
    weight = torch.randn(5, 9)

    def stacked(x, *_):
        return fused_ffn_stack(x, *map(list, zip(*layers, strict=True)), TEXT, p_drop=0.25, seed=9)

    def one_by_one(x, *_):
        for stream, layer in enumerate(layers):
            value = ffn(x, *layer, EXPRESSION, return_ln=False)
            kept = dropout_mask(value.shape, 0.25, 9, stream=stream)
            x = F.layer_norm(x + value * kept / 0.75, (9,), layer[4], layer[5], 1e-12)
        return x

    for a, e in zip(with_gradients(stacked, leaves, weight), with_gradients(one_by_one, leaves, weight), strict=True):
        torch.testing.assert_close(a, e, **CLOSE)


def test_bare_expressions_and_their_stack(backend):
    x, *rest = inputs32()
    out = fused_ffn(x, *rest[:4], None, None, TEXT, return_ln=False)
    once = ffn(x, *rest[:4], None, None, EXPRESSION, return_ln=False)
    torch.testing.assert_close(out, once, **CLOSE)
    twice = fused_ffn_stack(x, *([t, t] for t in rest[:4]), [], [], TEXT)
    torch.testing.assert_close(twice, ffn(once, *rest[:4], None, None, EXPRESSION, return_ln=False), **CLOSE)


def test_dropout_is_that_of_philox(backend):
    inputs = inputs32(Case(EXPRESSION, "truncate", 33, 9, 7))
    for p_drop in (0.1, 0.5, 1.0):
        for seed in (0, 5, 2**40 + 3, 2**63 + 17, -1):
            own = fused_ffn(*inputs, TEXT, p_drop=p_drop, seed=seed)
            torch.testing.assert_close(own, ffn(*inputs, EXPRESSION, p_drop=p_drop, seed=seed), **CLOSE)
    drawn = fused_ffn(*inputs, TEXT, p_drop=0.1, seed=torch.tensor([5]))
    assert torch.equal(drawn, fused_ffn(*inputs, TEXT, p_drop=0.1, seed=5))


def test_a_drawn_seed_follows_manual_seed(backend):
    inputs = inputs32()
    torch.manual_seed(7)
    first = fused_ffn(*inputs, TEXT, p_drop=0.5)
    other = fused_ffn(*inputs, TEXT, p_drop=0.5)
    torch.manual_seed(7)
    assert torch.equal(first, fused_ffn(*inputs, TEXT, p_drop=0.5))
    assert not torch.equal(first, other)


SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e30, -1e30, 100.0, -100.0)


@pytest.mark.parametrize(
    "text",
    [
        f"linear({op}(linear(x,wb1)),wb2)"
        for op in ("gelu", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "swish", "gelu_erf", "relu2", "softplus")
    ]
    + ["max(linear(relu(linear(x,wb1)),wb2),x)", "mul(linear(relu(linear(x,wb1)),wb2),sigmoid(x))"],
)
def test_nan_and_infinity_propagate_as_eager(backend, text):
    """Weights of a single product pass each special value alone, so that only elementwise code decides."""
    n = len(SPECIAL)
    x = torch.zeros(n, 1)
    x[:, 0] = torch.tensor(SPECIAL)
    x.requires_grad_()
    w1, b1, w2, b2 = torch.ones(1, 1), torch.zeros(1), torch.ones(1, 1), torch.zeros(1)
    own = fused_ffn(x, w1, b1, w2, b2, None, None, text, return_ln=False)
    # one value at a time: PyTorch's vector code makes gelu(inf) NaN, its scalar code inf, which is the limit
    rows = [ffn(row, w1, b1, w2, b2, None, None, parse_expression(text), return_ln=False) for row in x.split(1)]
    expected = torch.cat(rows)
    agreed = torch.ones(n, 1, dtype=torch.bool)
    if "gelu_erf" in text and backend == "reference":
        agreed[SPECIAL.index(float("inf"))] = False
    torch.testing.assert_close(own[agreed], expected[agreed], rtol=1e-5, atol=1e-6, equal_nan=True)
    own_gradient = torch.autograd.grad(own, x, torch.ones(n, 1))[0]
    expected_gradient = torch.autograd.grad(expected, x, torch.ones(n, 1))[0]
    torch.testing.assert_close(own_gradient, expected_gradient, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_identity_instructions_of_a_loaded_program(backend):
    """No expression lowers to them, but a serialized program may hold them: value, gradient, dual and pair."""
    case, program = identity_case()
    inputs = tensors(case, 5, torch.float32)
    weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(0))
    own = with_gradients(lambda *i: fused_ffn(*i, program), inputs, weight)
    lowered = with_gradients(lambda *i: fused_ffn(*i, case.expression), inputs, weight)
    for a, b in zip(own, lowered, strict=True):
        assert error(a, b) <= 4 * 2.0**-24  # equal but for a product with 1


def test_ties_of_max_split_the_gradient(backend):
    x = torch.tensor([[1.0, -2.0]], requires_grad=True)
    w2 = torch.eye(2)
    out = fused_ffn(x, torch.eye(2), torch.zeros(2), w2, torch.zeros(2), None, None,
                    "max(linear(leaky_relu(linear(x,wb1)),wb2),x)", return_ln=False)  # fmt: skip
    # at 1 both operands are 1: half of slope 1 each; at -2 the left one, slope 0.01
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.tensor([[1.0, 0.01]]))


def test_inference_mode_and_no_grad(backend):
    inputs = inputs32()
    expected = fused_ffn(*inputs, TEXT)
    with torch.no_grad():
        assert torch.equal(fused_ffn(*inputs, TEXT), expected)
    with torch.inference_mode():
        assert torch.equal(fused_ffn(*inputs, TEXT), expected)


def test_second_derivatives_are_refused_when_asked_for(backend):
    inputs = inputs32()
    gradient = torch.autograd.grad(fused_ffn(*inputs, TEXT).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


def test_gradients_without_save_are_those_with_it(backend):
    """A traced graph holds one value of `save`, and is run with gradients and without."""
    inputs = inputs32()
    weight = torch.randn_like(inputs[0])
    given = [ffn_fwd(*op_arguments(inputs, save=save)) for save in (False, True)]
    assert given[0][1] == []
    assert torch.equal(given[0][0], given[1][0])
    own, other = (torch.autograd.grad(out, inputs, weight) for out, _ in given)
    assert all(map(torch.equal, own, other))


def broken(**changes):
    values = dict(zip(NAMES, inputs32(), strict=True))
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": torch.randn(7, 8)}, r"w1 has shape \(7, 8\), expected \(7, 9\)"),
        ({"w1": torch.randn(9)}, "w1 must have two dimensions"),
        ({"b1": torch.randn(6)}, "b1 has shape"),
        ({"w2": torch.randn(7, 9)}, "w2 has shape"),
        ({"b2": torch.randn(9, 1)}, "b2 has shape"),
        ({"ln_weight": torch.randn(8)}, "ln_weight has shape"),
        ({"ln_bias": torch.randn(9).double()}, "ln_bias is torch.float64"),
        ({"w2": torch.randn(9, 7).bfloat16()}, "w2 is torch.bfloat16"),
        ({"b1": torch.randn(7, device="meta")}, "b1 is on meta, but x is on cpu"),
        ({"w1": torch.randn(9, 7).t()}, r"w1 has strides \(1, 7\)"),
        ({"w1": torch.randn(1, 1).expand(7, 9)}, r"w1 has strides \(0, 0\)"),
        ({"x": torch.ones(5, 9, dtype=torch.int64)}, "x must be floating"),
        ({"x": torch.ones(())}, "x must have at least one dimension"),
        ({"ln_weight": None}, "ln_weight is needed"),
        ({"p_drop": 1.5, "seed": 0}, "p_drop must lie in"),
        ({"p_drop": -0.1, "seed": 0}, "p_drop must lie in"),
        ({"p_drop": 0.1, "seed": torch.zeros(1)}, "seed must be one int64"),
        ({"eps": -1.0}, "eps must not be negative"),
        ({"return_ln": False, "p_drop": 0.1}, "without LayerNorm"),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        fused_ffn(**broken(**changes), program=TEXT)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("linear(x,wb1)", "wb2 occurs 0 times"),
        ("linear(gleu(linear(x,wb1)),wb2)", "unknown operator 'gleu'"),
        (7, "not int"),
        ("max(linear(x,wb1),linear(x,wb2))", r"needs d == H, but x has H=9 and w1 has d=7"),
    ],
)
def test_wrong_programs_are_named(program, message):
    with pytest.raises(ExpressionError, match=message):
        fused_ffn(*inputs32(), program)


def test_the_operator_refuses_damaged_programs_and_foreign_flags(backend):
    arguments = list(op_arguments(inputs32()))
    with pytest.raises(ExpressionError, match="flags"):
        ffn_fwd(*arguments[:8], 3, *arguments[9:])
    damaged = arguments[7].clone()
    damaged[-1] = 77
    with pytest.raises(ExpressionError, match="program segment"):
        ffn_fwd(*arguments[:7], damaged, *arguments[8:])


def test_programs_texts_and_trees_are_the_same(backend):
    inputs = inputs32()
    expected = fused_ffn(*inputs, TEXT)
    for program in (EXPRESSION, lower(TEXT), load_program(lower(TEXT).tensor)):
        assert torch.equal(fused_ffn(*inputs, program), expected)
