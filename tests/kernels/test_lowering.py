"""Lowering: segments against autograd of the expression tree, registers, cache."""

from __future__ import annotations

from random import Random

import pytest
import torch
from ffn_cases import RELEASED, random_case, tensors

from kernels.backends.reference import ReferenceBackend
from kernels.ffn.ops import fused_ffn
from kernels.language import lowering
from kernels.language.execute import run_segment
from kernels.language.expression import Expression, ExpressionError, X, apply, linear, parse_expression
from kernels.language.graph import _FEW_REGISTERS, greedy_order, late_order, merge_derivatives, schedule
from kernels.language.lowering import lower
from kernels.language.operators import UNARY
from kernels.language.pressure import TooFewRegisters, fit
from kernels.language.program import MAX_TEMPORARIES, Form, Segment, decode_segments, encode
from kernels.reference.ffn import evaluate


def run_bare(program, x, w1, b1, w2, b2):
    """The bare expression by forward segments, in plain products."""
    words = program.words
    pre = run_segment(words, Segment.PRE, x)[0]
    first = pre @ w1.T + b1
    if words[3] == Form.PARALLEL:
        second = run_segment(words, Segment.MID, x)[0] @ w2.T + b2
        return run_segment(words, Segment.POST, x, first, second)[0]
    second = run_segment(words, Segment.MID, x, first)[0] @ w2.T + b2
    return run_segment(words, Segment.POST, x, second)[0]


def test_forward_segments_equal_the_expression_tree():
    rng = Random(2)
    for seed in range(200):
        case = random_case(rng, (1, 3, 6, 9), (4,))
        inputs = [t.detach() for t in tensors(case, seed)[:5]]
        expected = evaluate(case.expression, *inputs, policy=case.policy)
        # float64, the same operations in the same order except that equal subtrees are computed once
        torch.testing.assert_close(
            run_bare(lower(case.expression, case.policy), *inputs), expected, rtol=1e-12, atol=1e-12, msg=str(case)
        )


@pytest.mark.parametrize("with_value", [False, True], ids=["bwd", "bwdv"])
def test_backward_segments_equal_autograd_of_the_forward_segments(with_value):
    rng = Random(3)
    offset = Segment.PRE_BWDV if with_value else Segment.PRE_BWD
    for seed in range(150):
        case = random_case(rng, (3, 6, 9), (4,))
        program = lower(case.expression, case.policy)
        generator = torch.Generator().manual_seed(seed)
        h, d = case.hidden, case.inner
        for place in (Segment.PRE, Segment.MID, Segment.POST):
            serial_mid = place == Segment.MID and program.words[3] == Form.SERIAL
            width = d if serial_mid else h
            parallel_post = place == Segment.POST and program.words[3] == Form.PARALLEL
            count = {Segment.PRE: 0, Segment.MID: int(serial_mid), Segment.POST: 1 + parallel_post}[place]
            x = torch.randn(4, h, dtype=torch.float64, generator=generator, requires_grad=True)
            *ab, g = (torch.randn(4, width, dtype=torch.float64, generator=generator) for _ in range(count + 1))
            for t in ab:
                t.requires_grad_()
            value = run_segment(program.words, place, x, *ab)[0]
            expected = torch.autograd.grad(value, [x, *ab], g, allow_unused=True)
            segment = Segment(place + offset)
            with torch.no_grad():
                again, dx, *dab = run_segment(program.words, segment, x, *[*ab, None, None][:2], g)
            if with_value:
                assert torch.equal(again, value), str(case)
            columns = min(width, h)
            for own, reference in zip([dx, *dab], expected, strict=False):
                if own is None:
                    assert reference is None
                    continue
                # the same products in another order: a few units of float64 rounding
                torch.testing.assert_close(
                    own[:, :columns], reference[:, :columns], rtol=1e-10, atol=1e-12, msg=f"{case} {segment.name}"
                )


def outputs_of(code, x, a, b, grad):
    """Runs one segment's code alone: as all nine segments of a program."""
    words = encode([code] * 9, Form.SERIAL, "truncate", 0, 0)
    return run_segment(words, Segment.PRE, x, a, b, grad)


@pytest.mark.parametrize("limit", [None, 4, 6], ids=["everything again", "4 registers", "6 registers"])
def test_recomputed_code_equals_shared_code(limit):
    rng = Random(4)
    compared = 0
    for seed in range(60):
        case = random_case(rng, (5,), (3,))
        g = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(3, 5, dtype=torch.float64, generator=g) for _ in range(4)]
        form, trees, _ = lowering._split(case.expression, case.policy)
        for place, (tree, leaves) in enumerate(trees):
            segment = lowering._Segment(tree, leaves, case.policy == "pad" and form == Form.SERIAL and place == 1)
            if limit is None:
                code = segment._recomputed(value=True, gradients=True)
            else:
                operations, outputs, _ = segment._shared(value=True, gradients=True)
                try:
                    code = fit(late_order(operations, outputs), outputs, limit)
                except TooFewRegisters:
                    continue
                assert code.temporaries <= limit
            compared += 1
            shared = segment.compile(value=True, gradients=True)
            for own, other in zip(outputs_of(code, *inputs), outputs_of(shared, *inputs), strict=True):
                assert (own is None) == (other is None)
                if own is not None:  # sums of gradients in another order
                    torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12, msg=str(case))
    assert compared > 120


def test_the_order_with_the_fewest_registers_is_chosen():
    rng = Random(5)
    improved = 0
    for _ in range(200):
        case = random_case(rng, (5,), (3,))
        form, trees, _ = lowering._split(case.expression, case.policy)
        for place, (tree, leaves) in enumerate(trees):
            segment = lowering._Segment(tree, leaves, case.policy == "pad" and form == Form.SERIAL and place == 1)
            operations, outputs, fresh = segment._shared(value=True, gradients=True)
            operations = merge_derivatives(operations, fresh)
            orders = [operations, late_order(operations, outputs), greedy_order(operations, outputs)]
            given, *others = [schedule(order, outputs, reorder=False).temporaries for order in orders]
            chosen = schedule(operations, outputs, reorder=True).temporaries
            assert chosen == (given if given <= _FEW_REGISTERS else min(given, *others)), str(case)
            improved += chosen < given
    assert improved > 10


def distinct_leaf(k: int) -> Expression:
    """A chain of four activations that spells k in base 8, so that no two leaves are shared."""
    leaf = X
    for digit in range(4):
        leaf = apply(UNARY[k // 8**digit % 8], leaf)
    return leaf


def full_tree(height: int, k: int = 0) -> Expression:
    """A full binary tree over x whose subtrees all differ."""
    if height == 0:
        return distinct_leaf(k)
    return apply("mul" if height % 2 else "max", full_tree(height - 1, 2 * k), full_tree(height - 1, 2 * k + 1))


def test_the_highest_expressions_of_the_space_fit_the_register_file():
    body = apply("add", linear(apply("gelu", linear(full_tree(4), "wb1")), "wb2"), full_tree(6))
    for segment in decode_segments(lower(body).words):
        assert segment.temporaries <= MAX_TEMPORARIES


def test_an_expression_too_large_for_the_register_file_is_refused_by_name():
    body = linear(apply("gelu", linear(full_tree(10), "wb1")), "wb2")
    with pytest.raises(ExpressionError, match=r"instructions|registers"):
        lower(body)


def test_released_expressions_need_few_registers():
    for text in RELEASED:
        assert max(s.temporaries for s in decode_segments(lower(text).words)) <= 4


def test_value_and_derivative_share_one_transcendental():
    segments = decode_segments(lower("linear(gelu(linear(x,wb1)),wb2)").words)
    assert len(segments[Segment.MID_BWDV].instructions) == 1
    chain = decode_segments(lower("linear(tanh(mul(gelu(linear(x,wb1)),x)),wb2)").words)
    opcodes = [i.opcode for i in chain[Segment.MID_BWD].instructions]
    assert opcodes.count(16) == 0  # gelu's value comes with its derivative


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear(x,wb1)", "wb2 occurs 0 times"),
        ("linear(linear(x,wb2),wb1)", "wb1 must come first"),
        ("linear(gelu(linear(x,wb1)),wb3)", "wb1 or wb2"),
    ],
)
def test_invalid_expressions_are_refused(text, message):
    with pytest.raises(ExpressionError, match=message):
        lower(text)


def test_wrong_arguments_are_refused():
    with pytest.raises(ExpressionError, match="policy"):
        lower(RELEASED[0], "stretch")
    with pytest.raises(ExpressionError, match="not int"):
        lower(5)


def test_the_cache_is_bounded(monkeypatch):
    lowering.clear_cache()
    monkeypatch.setattr(lowering, "CACHE_SIZE", 8)
    rng = Random(5)
    for _ in range(40):
        lower(random_case(rng, (4,), (1,)).expression)
    assert len(lowering._cache) <= 8
    lowering.clear_cache()


def test_lowering_reads_no_sizes():
    """One program serves every width its rule allows."""
    program = lower("linear(relu(mul(linear(x,wb1),x)),wb2)")
    expression = parse_expression("linear(relu(mul(linear(x,wb1),x)),wb2)")
    for hidden, inner in ((5, 5), (9, 4), (7, 1)):
        g = torch.Generator().manual_seed(0)
        shapes = [(3, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,)]
        inputs = [torch.randn(s, dtype=torch.float64, generator=g) for s in shapes]
        torch.testing.assert_close(run_bare(program, *inputs), evaluate(expression, *inputs))


def test_the_reference_backend_is_always_there():
    assert ReferenceBackend().supports(None) is None


def test_lowering_between_forward_and_backward_changes_no_saved_program():
    """Programs share memory but not version counters: a new program is no change of an old one."""
    x = torch.randn(2, 4, requires_grad=True)
    weights = [torch.randn(3, 4), torch.zeros(3), torch.randn(4, 3), torch.zeros(4), torch.ones(4), torch.zeros(4)]
    program = lower("linear(gelu(linear(x,wb1)),wb2)")
    words, version = program.words, program.tensor._version
    out = fused_ffn(x, *weights, program)
    for operator in ("sigmoid", "tanh", "elu"):
        lower(f"{operator}(linear(swish(linear(x,wb1)),wb2))")
    out.sum().backward()
    assert program.tensor._version == version
    assert program.words == words
