"""A latency table with made-up costs."""

from fractions import Fraction

from engine.latency.table import Check, Conditions, LatencyTable
from kernels.language.operators import OPERATORS

RATIOS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))


def toy_table(shape, heads=4, policy="truncate", *, sequence_length=16, pairs=((1.0, 1.0), (2.0, 1.98), (3.0, 2.97))):
    """A table of every (stack, ratio) and operator; `pairs` of (predicted, measured) ms are its check."""
    return LatencyTable(
        shape=shape,
        heads=heads,
        policy=policy,
        conditions=Conditions(sequence_length=sequence_length, hardware="made up"),
        fixed=1.0,
        layers={(n, r): 0.1 + n * (0.05 + 0.4 * float(r)) for n in (1, 2, 3, 4) for r in RATIOS},
        parallel=0.02,
        segments={"pre": 1e-4, "post": 2e-4},
        operators={**{name: 1e-4 * (1 + len(name) / 10) for name in OPERATORS}, "select": 1e-5},
        check=Check.of([p for p, _ in pairs], [m for _, m in pairs]),
        measured=101,
    )
