"""The Triton scan of CRFs against float64: under Triton's interpreter, and on a GPU (see `test_triton_losses`).

Bounds are those of `test_crf`: a few roundings of 6e-8 a position.
"""

from __future__ import annotations

import pytest
import torch
from crf_cases import random_chain, to
from triton_places import INTERPRETER, passes_under_the_interpreter, triton_device  # noqa: F401  a fixture

from kernels.crf import ops
from kernels.crf.ops import Chain


@pytest.mark.skipif(INTERPRETER, reason="this is the child process")
def test_under_the_interpreter():
    passes_under_the_interpreter(__file__)


def moved(chain, device):
    return Chain(*(t.to(device) for t in chain))


def forbidding_chain():
    """Forbidden transitions and scores hundreds apart: the only way may lead through tags far below others."""
    chain = random_chain(3, 8, 9, seed=3, scale=30.0, lengths=[8, 5, 1])
    generator = torch.Generator().manual_seed(4)
    forbidden = torch.rand(9, 9, generator=generator) < 0.6
    return chain._replace(transitions=chain.transitions.masked_fill(forbidden, -torch.inf))


@pytest.mark.parametrize("size", [(3, 1, 1), (4, 13, 9), (2, 5, 33), "forbidding"], ids=str)
def test_log_z_marginals_and_best_sequences_are_exact_to_rounding(device, size):
    chain = to(forbidding_chain() if size == "forbidding" else random_chain(*size, scale=2.0), torch.float32)
    exact, own = to(chain, torch.float64), moved(chain, device)
    log_z, found, (_, best) = ops.log_partition(own), ops.marginals(own), ops.decode(own)
    expected = ops.marginals(exact)
    torch.testing.assert_close(log_z.cpu(), ops.log_partition(exact), rtol=1e-6, atol=2e-5)
    torch.testing.assert_close(found.tags.cpu().double(), expected.tags, rtol=0, atol=3e-5)
    torch.testing.assert_close(found.pairs.cpu().double(), expected.pairs, rtol=0, atol=1e-4)
    scores = ops.score(exact, best.cpu().clamp(min=0))
    torch.testing.assert_close(scores, ops.decode(exact)[0], rtol=1e-7, atol=1e-5)


def test_gradients_and_padding(device):
    chain = random_chain(4, 7, 5, dtype=torch.float32, lengths=[7, 3, 1, 0])
    target = ops.marginals(to(random_chain(4, 7, 5, seed=1, lengths=[7, 3, 1, 0]), torch.float64))
    exact = [t.double().requires_grad_() for t in chain[:4]]
    ops.divergence(Chain(*exact, chain.lengths), target).sum().backward()
    filled = torch.where(chain.mask()[..., None], chain.emissions, torch.nan)
    own = [t.to(device).requires_grad_() for t in (filled, *chain[1:4])]
    target = ops.Marginals(target.tags.to(device), target.pairs.to(device), target.entropy.to(device))
    ops.divergence(Chain(*own, chain.lengths.to(device)), target).sum().backward()
    for found, expected in zip(own, exact, strict=True):
        torch.testing.assert_close(found.grad.cpu().double(), expected.grad, rtol=0, atol=1e-5)


def test_a_sentence_without_any_allowed_sequence_has_no_marginals(device):
    chain = random_chain(2, 3, 2, dtype=torch.float32, lengths=[3, 1])
    own = moved(chain._replace(transitions=torch.full((2, 2), -torch.inf)), device)
    assert ops.log_partition(own)[0] == -torch.inf
    assert ops.marginals(own).tags[0, 2].sum() == 0
    assert ops.marginals(own).tags[1].sum().item() == pytest.approx(1.0)
