"""Programs with words changed at random, given to the op and straight to the C++ entry points.

    python tests/faults/corrupt_programs.py --count 20000 --seed 0

The op must refuse them by name or run a program that is valid by chance. The C++ entry points, which Python never
calls without that check, must refuse them or run within their memory; under AddressSanitizer (`make sanitize`) any
access outside ends this process.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from ffn_cases import random_case

from kernels.dispatch import load_backend
from kernels.ffn.schemas import make_call
from kernels.language.expression import ExpressionError
from kernels.language.lowering import lower
from kernels.language.program import FIRST_INSTRUCTION
from kernels.language.validation import validate_program

SIZES = (1, 3, 7, 16, 33)


def corrupted(rng: Random, words: list[int]) -> list[int]:
    """One to three words replaced: by a neighbour, a register, a flipped bit, or anything."""
    words = list(words)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words)) if rng.random() < 0.6 else rng.randrange(16, min(len(words), 120))
        words[at] = rng.choice(
            [
                words[at] + rng.choice((-1, 1)),
                rng.randrange(-2, 24),
                words[at] ^ (1 << rng.randrange(31)),
                rng.randrange(-(1 << 31), 1 << 31),
                (words[at] & ~0xFF) | rng.randrange(256),
            ]
        )
        words[at] = max(-(1 << 31), min((1 << 31) - 1, words[at]))
    if rng.random() < 0.05:
        words = words[: rng.randrange(len(words) + 1)] if rng.random() < 0.5 else words + [rng.randrange(99)] * 4
    return words


def attack(count: int, seed: int) -> dict[str, int]:
    """Counts of what became of `count` corrupted programs; raises where a protection failed."""
    rng = Random(seed)
    backend = load_backend("cpu")
    counts = {"refused by validation": 0, "valid by chance": 0, "refused by C++": 0, "run by C++": 0}
    case = program = tensors = None
    for number in range(count):
        if number % 20 == 0:
            case = random_case(rng, SIZES, (1, 5, 17))
            program = lower(case.expression, case.policy)
            tensors = _tensors(case, seed + number)
        words = corrupted(rng, list(program.words))
        if tuple(words) == program.words:
            continue
        bad = torch.tensor(words, dtype=torch.int32)
        try:
            validate_program(bad)
        except ExpressionError:
            counts["refused by validation"] += 1
        else:
            counts["valid by chance"] += 1
        if isinstance(backend, str):
            continue
        with_ln = rng.random() < 0.5
        x, w1, b1, w2, b2, ln_weight, ln_bias = tensors
        ln = ([ln_weight], [ln_bias]) if with_ln else ([], [])
        call = make_call(x, [w1], [b1], [w2], [b2], *ln, program.tensor, int(program.flags), 0.0, None, 1e-12, None)
        _, saved = backend.forward(call, True)
        call.program = bad
        for run in (
            lambda c=call: backend.forward(c, True),
            lambda c=call, s=saved: backend.backward(c, torch.ones_like(c.x), s, [True] * (1 + len(c.parameters))),
        ):
            try:
                run()
                counts["run by C++"] += 1
            except RuntimeError as error:
                if "program is not valid" not in str(error):
                    raise
                counts["refused by C++"] += 1
    return counts


def _tensors(case: object, seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden, inner = case.hidden, case.inner
    shapes = [(case.tokens, hidden), (inner, hidden), (inner,), (hidden, inner), (hidden,), (hidden,), (hidden,)]
    return [torch.randn(*shape, generator=g) for shape in shapes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = attack(arguments.count, arguments.seed)
    print(f"{arguments.count} corrupted programs (first instruction at word {FIRST_INSTRUCTION}):", counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
