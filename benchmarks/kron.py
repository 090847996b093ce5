"""Kronecker weights: the factored route against the written-out weight, one FFN each: `python -m benchmarks.kron`.

Both weights are factored by the rule of `kernels.language.kron_shape`. `whole` writes A (x) B out and runs the fused
kernels, `factored` runs two small products per weight, `full` is the fused FFN with ordinary weights of the same
widths. Times are medians over rounds in alternating order; `route` marks what `kernels.ffn.kron.is_factored` takes.

Rejected: timing the products alone. The factored route pays outside them, in elementwise code that is not fused.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from benchmarks.timing import interleaved
from kernels.dispatch import preferred_backend, use_backend
from kernels.ffn import kron
from kernels.ffn.kron import KronWeight
from kernels.ffn.ops import fused_ffn
from kernels.language.kron_shape import default_block, factor_shapes
from kernels.language.lowering import lower

CASES = ((96, 96), (192, 192), (540, 135), (540, 540), (768, 3072))
TOKENS = (32, 512, 4096)
TEXT = "kron(gelu(kron(x,wb1)),wb2)"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the two smallest shapes, 3 rounds")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rounds = 3 if options.quick else options.rounds
    print(f"milliseconds, float32, {options.threads} thread(s), torch {torch.__version__}, medians of {rounds}")
    print(f"{'H':>5} {'d':>5} {'tokens':>7}  {'forward: whole':>15} {'factored':>9} {'full':>9}", end="")
    print(f"  {'with backward: whole':>21} {'factored':>9} {'full':>9}  route")
    for hidden, inner in CASES[:2] if options.quick else CASES:
        for tokens in TOKENS:
            _line(hidden, inner, tokens, rounds)


def _line(hidden: int, inner: int, tokens: int, rounds: int) -> None:
    torch.manual_seed(0)
    block = default_block(hidden, [inner])
    x = torch.randn(tokens, hidden, requires_grad=True)
    w1, w2 = (
        KronWeight(
            *(torch.randn(s).mul_(hidden**-0.25).requires_grad_() for s in factor_shapes(w, block, hidden, inner))
        )
        for w in ("wb1", "wb2")
    )
    full = [w.whole().detach().requires_grad_() for w in (w1, w2)]
    rest = [torch.zeros(inner), torch.zeros(hidden), torch.ones(hidden), torch.zeros(hidden)]
    backend = preferred_backend("cpu")

    def run(first: kron.Weight, second: kron.Weight) -> torch.Tensor:
        return fused_ffn(x, first, rest[0], second, rest[1], rest[2], rest[3], TEXT)

    def whole() -> torch.Tensor:
        with use_backend(backend):  # a forced backend writes the weight out
            return run(w1, w2)

    def factored() -> torch.Tensor:
        program = kron.Call(
            x, [w1], rest[:1], [w2], rest[1:2], rest[2:3], rest[3:], lower(TEXT).tensor, 0.0, None, 1e-12, torch.float32
        )
        return kron.run_factored(program)

    functions = (whole, factored, lambda: run(*full))
    torch.testing.assert_close(whole(), factored(), rtol=1e-3, atol=1e-4)
    forward = _medians(functions, _without_gradients, rounds)
    backward = _medians(functions, _with_backward, rounds)
    route = "factored" if kron.is_factored(x, [w1], [w2]) else "whole"
    print(f"{hidden:5d} {inner:5d} {tokens:7d}  {forward[0]:15.2f} {forward[1]:9.2f} {forward[2]:9.2f}", end="")
    print(f"  {backward[0]:21.2f} {backward[1]:9.2f} {backward[2]:9.2f}  {route}", flush=True)


def _without_gradients(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def _with_backward(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = function()
        out.backward(out.detach())

    return run


def _medians(
    functions: Sequence[Callable[[], torch.Tensor]],
    wrap: Callable[[Callable[[], torch.Tensor]], Callable[[], None]],
    rounds: int,
) -> list[float]:
    """Milliseconds per call."""
    sides = {str(k): wrap(function) for k, function in enumerate(functions)}
    return [1e3 * seconds for seconds in interleaved(sides, rounds).values()]


if __name__ == "__main__":
    main()
