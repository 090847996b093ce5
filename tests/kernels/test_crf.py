"""The CRF scan: exact against enumeration in float64, gradients, registration; the C++ kernel against float64.

float32 is judged against float64 of the same float32 inputs: a few roundings of 6e-8 a position, so 1e-5 for
probabilities of up to 127 positions and 2e-5 for log Z, whose sums are float64.
"""

from __future__ import annotations

import pytest
import torch
from crf_cases import (
    enumerated_divergence,
    enumerated_log_z,
    enumerated_marginals,
    random_chain,
    sequences,
    to,
)

from kernels.crf import ops, registration
from kernels.crf.ops import Chain, Marginals
from kernels.dispatch import available_backends, use_backend

CPU = pytest.param("cpu", marks=pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"no C++ kernels: {available_backends()['cpu']}"))  # fmt: skip
SIZES = [(5, 1, 1), (4, 2, 2), (6, 127, 9), (5, 33, 17), (3, 40, 31), (3, 21, 64), (2, 9, 48)]


@pytest.mark.parametrize("tags", [1, 2, 3])
def test_log_z_marginals_and_best_sequence_equal_enumeration(tags):
    chain = random_chain(6, 6, tags, lengths=[6, 5, 3, 2, 1, 0])
    torch.testing.assert_close(ops.log_partition(chain), enumerated_log_z(chain), rtol=0, atol=1e-10)
    found, (own_tags, own_pairs) = ops.marginals(chain), enumerated_marginals(chain)
    torch.testing.assert_close(found.tags, own_tags, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.pairs, own_pairs, rtol=0, atol=1e-10)
    scores, best = ops.decode(chain)
    for b in range(6):
        all_tags, all_scores = sequences(chain, b)
        words = int(chain.lengths[b])
        assert best[b, :words].tolist() == all_tags[all_scores.argmax()].tolist()
        assert best[b, words:].tolist() == [-1] * (6 - words)
        assert scores[b].item() == pytest.approx(all_scores.max().item(), abs=1e-10)
        log_p = torch.log_softmax(all_scores, 0)
        assert found.entropy[b].item() == pytest.approx(-(log_p.exp() * log_p).sum().item(), abs=1e-10)


def test_scores_of_given_sequences_equal_enumeration():
    chain = random_chain(4, 4, 3, lengths=[4, 3, 1, 0])
    generator = torch.Generator().manual_seed(1)
    tags = torch.randint(0, 3, (4, 4), generator=generator)
    found = ops.score(chain, tags)
    for b in range(4):
        all_tags, scores = sequences(chain, b)
        index = (all_tags == tags[b, : int(chain.lengths[b])]).all(1).nonzero()[0, 0]
        assert found[b].item() == pytest.approx(scores[index].item(), abs=1e-12)


def test_divergence_equals_enumeration_with_gradients_and_is_zero_for_equal_chains():
    teacher, student = (random_chain(5, 5, 3, seed=s, lengths=[5, 4, 2, 1, 0]) for s in (1, 2))
    own = [t.clone().requires_grad_() for t in student[:4]]
    found = ops.divergence(Chain(*own, student.lengths), ops.marginals(teacher))
    exact = enumerated_divergence(teacher, Chain(*own, student.lengths))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    assert (found[:4] > 0).all()
    wanted = torch.autograd.grad(exact.sum(), own)
    for gradient, expected in zip(torch.autograd.grad(found.sum(), own), wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    assert ops.divergence(teacher, ops.marginals(teacher)).abs().max() < 1e-12


def test_gradcheck():
    chain = random_chain(3, 5, 3, lengths=[5, 2, 0])
    inputs = [t.clone().requires_grad_() for t in chain[:4]]
    assert torch.autograd.gradcheck(lambda *own: ops.log_partition(Chain(*own, chain.lengths)), inputs)
    target = ops.marginals(random_chain(3, 5, 3, seed=1, lengths=[5, 2, 0]))
    assert torch.autograd.gradcheck(lambda *own: ops.divergence(Chain(*own, chain.lengths), target), inputs)
    best = torch.autograd.gradcheck(lambda *own: registration.crf_scan(*own, chain.lengths, True)[0], inputs)
    assert best


@pytest.mark.parametrize("best", [False, True], ids=["log", "max"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_opcheck(dtype, best):
    chain = random_chain(3, 4, 3, dtype=dtype)
    inputs = [*(t.clone().requires_grad_() for t in chain[:4]), chain.lengths]
    torch.library.opcheck(registration.crf_scan, (*inputs, best))
    alpha = registration.crf_scan(*chain, best)[1]
    torch.library.opcheck(registration.crf_scan_bwd, (*chain, alpha, best))


def test_a_second_derivative_is_refused():
    chain = random_chain(2, 3, 2)
    emissions = chain.emissions.requires_grad_()
    (gradient,) = torch.autograd.grad(ops.log_partition(chain).sum(), emissions, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", [CPU])
def test_float32_kernels_are_exact_to_rounding(backend, size):
    chain = random_chain(*size, dtype=torch.float32, scale=2.0)
    exact = to(chain, torch.float64)
    with use_backend(backend, strict=True):
        log_z, found, (_, best) = ops.log_partition(chain), ops.marginals(chain), ops.decode(chain)
    torch.testing.assert_close(log_z, ops.log_partition(exact), rtol=0, atol=2e-5)
    own = ops.marginals(exact)
    torch.testing.assert_close(found.tags.double(), own.tags, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.pairs.double(), own.pairs, rtol=0, atol=1e-4)
    scores = ops.score(exact, best.clamp(min=0))
    torch.testing.assert_close(scores, ops.decode(exact)[0], rtol=0, atol=1e-5)
    words = chain.mask().sum(1)
    torch.testing.assert_close(found.tags.sum((1, 2)), words.float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.pairs.sum((1, 2)), (words - 1).clamp(min=0).float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.pairs.sum(1), found.tags[:, 1:].sum(1), rtol=0, atol=1e-4)


def extreme_chain(kind, dtype=torch.float32):
    """Chains whose sums leave float32's range unless logarithms are kept."""
    chain = random_chain(4, 12, 9, seed=3, lengths=[12, 7, 1, 0])
    emissions, transitions, start, end, lengths = chain
    generator = torch.Generator().manual_seed(4)
    forbidden = torch.rand(9, 9, generator=generator) < 0.6
    forbidden.fill_diagonal_(False)
    if kind == "large emissions":
        emissions = emissions * 1e4
    elif kind == "large transitions":
        transitions = transitions * 1e4
    elif kind == "one way":  # the only way leads through tags far below their neighbours
        transitions = torch.full((9, 9), -torch.inf, dtype=torch.float64)
        transitions[torch.arange(8), torch.arange(1, 9)] = 0.0
        transitions[8, 0] = -3.0
        emissions = emissions * 300
    else:
        transitions = transitions.masked_fill(forbidden, {"-inf": -torch.inf, "-1e4": -1e4}[kind])
        emissions = emissions * 100
        if kind == "-inf":
            start = start.clone()
            start[3] = -torch.inf
    return to(Chain(emissions, transitions, start, end, lengths), dtype)


@pytest.mark.parametrize("kind", ["large emissions", "large transitions", "one way", "-inf", "-1e4"])
@pytest.mark.parametrize("backend", ["reference", CPU])
def test_scores_of_any_size_stay_exact(backend, kind):
    """Relative to the size of the scores, whose float32 rounding is inside: 1e4 x 6e-8 is 6e-4 of a logarithm."""
    chain = extreme_chain(kind)
    exact = to(chain, torch.float64)
    with use_backend(backend, strict=True):
        log_z, found = ops.log_partition(chain), ops.marginals(chain)
    own = ops.marginals(exact)
    torch.testing.assert_close(log_z, ops.log_partition(exact), rtol=1e-6, atol=1e-5)
    atol = 3e-3 if kind.startswith("large") else 1e-4
    torch.testing.assert_close(found.tags.double(), own.tags, rtol=0, atol=atol)
    torch.testing.assert_close(found.pairs.double(), own.pairs, rtol=0, atol=atol)
    assert found.tags.sum().item() == pytest.approx(20.0, abs=1e-3)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_padding_of_any_content_is_never_read(backend):
    chain = random_chain(5, 9, 7, dtype=torch.float32, lengths=[9, 4, 1, 0, 6])
    tags = torch.zeros(5, 9, dtype=torch.long)
    target = ops.marginals(random_chain(5, 9, 7, seed=8, dtype=torch.float32, lengths=[9, 4, 1, 0, 6]))
    results = []
    for filling in (0.0, torch.nan, torch.inf, -torch.inf):
        filled = torch.where(chain.mask()[..., None], chain.emissions, filling).requires_grad_()
        own = Chain(filled, *(t.clone().requires_grad_() for t in chain[1:4]), chain.lengths)
        with use_backend(backend, strict=True):
            loss = ops.divergence(own, target).sum() + (ops.log_partition(own) - ops.score(own, tags)).sum()
            loss.backward()
            results.append([loss.detach(), *(t.grad for t in own[:4]), *ops.marginals(own), ops.decode(own)[1]])
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.equal(value, expected)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_what_is_not_a_number_shows(backend):
    chain = random_chain(2, 5, 4, dtype=torch.float32, lengths=[5, 5])
    chain.emissions[0, 2, 1] = torch.nan
    with use_backend(backend, strict=True):
        log_z, found = ops.log_partition(chain), ops.marginals(chain)
    assert log_z.isnan().tolist() == [True, False]
    assert found.tags[0].isnan().any()
    assert not found.tags[1].isnan().any()


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_a_sentence_without_any_allowed_sequence_has_no_marginals(backend):
    chain = random_chain(2, 3, 2, dtype=torch.float32, lengths=[3, 1])
    chain.transitions.fill_(-torch.inf)
    with use_backend(backend, strict=True):
        assert ops.log_partition(chain)[0] == -torch.inf
        assert ops.marginals(chain).tags[0, 2].sum() == 0
        assert ops.marginals(chain).tags[1].sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("backend", ["reference", CPU])
def test_divergence_in_float32_is_never_negative_and_follows_float64(backend):
    for scale in (0.0, 1e-3, 0.1, 1.0):
        teacher = random_chain(4, 30, 9, seed=1, dtype=torch.float32)
        noise = random_chain(4, 30, 9, seed=2, dtype=torch.float32)
        student = Chain(*(t + scale * u for t, u in zip(teacher[:4], noise[:4], strict=True)), teacher.lengths)
        exact = ops.divergence(to(student, torch.float64), ops.marginals(to(teacher, torch.float64)))
        with use_backend(backend, strict=True):
            found = ops.divergence(student, ops.marginals(teacher))
        assert (found >= 0).all()
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=5e-6)


def test_gradients_reach_all_four_and_bfloat16_emissions():
    chain = random_chain(3, 6, 5, dtype=torch.float32)
    emissions = chain.emissions.bfloat16().requires_grad_()
    own = [t.clone().requires_grad_() for t in chain[1:4]]
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (ops.log_partition(Chain(emissions, *own, chain.lengths)) * weights).sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (emissions, *own)]
    (ops.log_partition(Chain(*exact, chain.lengths)) * weights).sum().backward()
    assert emissions.grad.dtype == torch.bfloat16
    torch.testing.assert_close(emissions.grad.double(), exact[0].grad, rtol=1e-2, atol=1e-3)
    for t, e in zip(own, exact[1:], strict=True):
        torch.testing.assert_close(t.grad.double(), e.grad, rtol=1e-5, atol=1e-5)


def test_backward_keeps_memory_linear_in_the_positions():
    sizes = {}
    for most in (32, 64):
        chain = random_chain(2, most, 8, dtype=torch.float32, lengths=[most, most])
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.setdefault(id(t), t), lambda t: t):
            ops.log_partition(Chain(chain.emissions.requires_grad_(), *chain[1:]))
        sizes[most] = sum(t.numel() for t in kept.values())
    fixed = 8 * 8 + 2 * 8 + 2
    assert sizes[32] - fixed == 2 * (2 * 32 * 8)
    assert sizes[64] - fixed == 2 * (2 * 64 * 8)


def test_compiles_into_one_graph():
    chain = random_chain(3, 6, 5, dtype=torch.float32)
    compiled = torch.compile(lambda c: ops.log_partition(c).sum(), fullgraph=True, backend="aot_eager")
    emissions = chain.emissions.clone().requires_grad_()
    compiled(Chain(emissions, *chain[1:])).backward()
    torch.testing.assert_close(emissions.grad, ops.marginals(chain).tags)


def test_wrong_shapes_are_named():
    chain = random_chain(2, 3, 4)
    with pytest.raises(ValueError, match=r"transitions are \(3, 3\), must be \(4, 4\)"):
        ops.log_partition(chain._replace(transitions=torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="lengths must be int64"):
        ops.log_partition(chain._replace(lengths=chain.lengths.int()))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        chain.divided(0.0)
    with pytest.raises(ValueError, match="target is"):
        ops.divergence(chain, Marginals(torch.zeros(2, 3, 3), torch.zeros(2, 3, 3), torch.zeros(2)))


def test_a_temperature_flattens_the_distribution_of_whole_sequences():
    chain = random_chain(2, 4, 3, lengths=[4, 3])
    flat = chain.divided(3.0)
    for b in range(2):
        torch.testing.assert_close(sequences(flat, b)[1], sequences(chain, b)[1] / 3)
