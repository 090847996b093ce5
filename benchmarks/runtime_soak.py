"""A day's work in minutes: a million passes of mixed shapes through one session, and whether memory stays flat.

    python -m benchmarks.runtime_soak [--passes 1000000] [--threads 2]

Passes of 1 to 8 sequences of 1 to 32 tokens, padded and not, of a small random model: scores, hidden rows, vectors,
input that is refused, and now and then another session with threads, opened and closed. Prints ten times what the
process holds (RSS, MB), and ends with exit code 1 where that is more than `--slack` MB more after the last pass than
after a tenth of them. Every tenth pass goes through a session of `--threads` threads, the others through one of one.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine.student import FFNASForSequenceClassification
from engine.student.configuration import FFNASConfig
from engine.student.native import describe
from kernels.runtime import NativeError, Session

WISHES = ("head", "head", "head", "hidden", "pooled", "mean", "max")


def resident_mb() -> float:
    """What this process holds in memory, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def model() -> tuple[object, object]:
    """A small classifier, as a session takes it."""
    torch.manual_seed(0)
    config = FFNASConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        embedding_type="full", pooling="mean", num_labels=3, max_position_embeddings=32,
    )  # fmt: skip
    return describe(FFNASForSequenceClassification(config).eval())


def soak(passes: int, threads: int) -> list[float]:
    """Runs the passes; MB held after each tenth of them."""
    parts = model()
    alone, shared = Session(parts, threads=1), Session(parts, threads=threads)
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(512):
        batch, length = int(rng.integers(1, 9)), int(rng.integers(1, 33))
        mask = np.arange(length) < rng.integers(1, length + 1, (batch, 1))
        cases.append((rng.integers(0, 500, (batch, length)), mask, str(rng.choice(WISHES))))
    bad = np.full((1, 3), 500)
    held, refused, began = [], 0, time.perf_counter()
    for i in range(passes):
        ids, mask, wanted = cases[int(rng.integers(512))]
        session = shared if i % 10 == 0 else alone
        session.run(ids, mask if i % 3 else None, wanted=wanted)
        if i % 100 == 0:
            try:
                session.run(bad)
            except NativeError:
                refused += 1
        if i % 1000 == 0:
            other = Session(parts, threads=threads)
            other.run(ids)
            other.close()
        if (i + 1) % (passes // 10) == 0:
            gc.collect()
            held.append(resident_mb())
            print(f"{i + 1} passes, {time.perf_counter() - began:.0f} s, {held[-1]:.1f} MB", flush=True)
    if refused != (passes + 99) // 100:
        raise AssertionError(f"{refused} of {(passes + 99) // 100} wrong inputs were refused")
    return held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--passes", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--slack", type=float, default=2.0, help="MB")
    options = parser.parse_args()
    held = soak(options.passes, options.threads)
    grown = held[-1] - held[0]
    print(f"{grown:+.1f} MB between the first tenth and the last")
    return int(grown > options.slack)


if __name__ == "__main__":
    sys.exit(main())
