"""How exact the FFN op must be, and a collector that checks it.

The rule for a value or gradient a of one case, with exact value e (float64 reference on the same inputs), eager
PyTorch's value b at the tested dtype, and p the exact value for inputs that are off by one rounding:

    error(a) <= 2 error(b) + 4 error(p) + FLOOR

error() is root mean square, relative. The second term is the conditioning of the case: where a sum cancels or a tanh
saturates, one rounding of the inputs already changes the result that much. The floor covers cases that eager computes
nearly exactly. Two kinds of results say nothing one by one, because eager's own error is a single draw; there the rule
holds for root mean squares over all such results of a chunk:

- few tokens (under 7) or few numbers (under 64): their errors are a handful of roundings, shared by all numbers;
- bfloat16 gradients behind a kink (relu, leaky_relu, max): rounding decides on which side an element falls, and the
  gradient is then off by a jump, in eager and in ours, but not in the same elements. In float32 that is rare enough to
  be left out: rows where a float64 value is within 1e-5 of a kink get no upstream gradient.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from ffn_cases import Case, error, has_kink, perturbed, tensors, undecided_rows, with_gradients

from kernels.dispatch import use_backend
from kernels.ffn.ops import fused_ffn
from kernels.reference.ffn import ffn

NAMES = ("out", "x", "w1", "b1", "w2", "b2", "ln_weight", "ln_bias")
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}
"""Largest relative error of one rounding."""
FLOOR = 8
"""Units: operands, two products, elementwise code and the result are each rounded once or twice."""


class Accuracy:
    """Collects complaints (empty when all is well) over the cases of a chunk."""

    def __init__(self, backends: list[str]) -> None:
        self.backends = backends
        self.complaints: list[str] = []
        self.pooled: dict[tuple[str, torch.dtype], list[tuple[float, float]]] = defaultdict(list)

    def check(self, case: Case, seed: int, dtype: torch.dtype) -> None:
        # LayerNorm over one or two columns gives -1, 0 or 1 whatever the FFN computes: gradients are rounding noise
        with_ln = seed % 5 != 0 and case.hidden > 2
        p_drop = 0.25 if with_ln and seed % 3 == 0 else 0.0
        options = {"policy": case.policy, "p_drop": p_drop, "seed": seed, "return_ln": with_ln}
        inputs = tensors(case, seed, dtype)[: 7 if with_ln else 5]
        weight = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(seed))
        kinked = has_kink(case.expression)
        if kinked and dtype == torch.float32:
            weight[undecided_rows(case, inputs)] = 0.0

        def run(function, leaves):
            rest = () if with_ln else (None, None)
            return with_gradients(lambda *i: function(*i, *rest, case.expression, **options), leaves, weight)

        exact = run(ffn, perturbed(inputs, 0.0, seed))
        off = run(ffn, perturbed(inputs, UNIT[dtype], seed))
        eager = run(ffn, inputs)
        for backend in self.backends:
            with use_backend(backend, strict=True):
                own = run(fused_ffn, inputs)
            for name, a, b, p, e in zip(NAMES, own, eager, off, exact, strict=False):
                if not (b.isfinite().all() and e.isfinite().all()):
                    continue
                mine, bound = error(a, e), 2 * error(b, e) + 4 * error(p, e) + FLOOR * UNIT[dtype]
                jumps = kinked and name != "out" and dtype == torch.bfloat16
                if jumps or case.tokens < 7 or min(e.numel(), case.tokens * case.hidden) < 64:
                    self.pooled[backend, dtype].append((min(mine, 1.0), min(bound, 2.0)))
                elif not mine <= bound:
                    self.complaints.append(f"{backend} {dtype} {name}: {mine:.2e} > {bound:.2e}: {case} seed={seed}")

    def finish(self) -> None:
        for (backend, dtype), pairs in self.pooled.items():
            mine, bound = (math.sqrt(sum(v[k] ** 2 for v in pairs) / len(pairs)) for k in (0, 1))
            if not mine <= bound:
                self.complaints.append(f"{backend} {dtype} pooled over the chunk: {mine:.2e} > {bound:.2e}")
        assert not self.complaints, f"{len(self.complaints)} complaints:\n" + "\n".join(self.complaints[:10])
