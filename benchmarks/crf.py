"""The scan of linear-chain CRFs beside two libraries: `python -m benchmarks.crf`.

    pip install torch-struct pytorch-crf        what it is compared with; a missing one is left out, and said so

Forward + backward is log Z of every sentence and the gradients of all scores: what training pays beside the encoder.
Times are medians over rounds in alternating order; memory is the highest resident size of a pass over what was there
before, in a process of its own, median of three. All sides get the same scores and give the same log Z and gradients,
which is checked first.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from benchmarks.environment import describe
from benchmarks.memory import PROCESSES, peak_bytes
from benchmarks.timing import interleaved
from kernels.crf.ops import Chain, log_partition

MODULES = {"ffnas": "kernels.crf.ops", "pytorch-crf": "torchcrf", "torch-struct": "torch_struct"}


class Size(NamedTuple):
    """Sentences, words of each at most, tags."""

    batch: int
    words: int
    tags: int


SIZES = (Size(32, 64, 17), Size(32, 64, 9), Size(8, 256, 33))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="the first size only")
    parser.add_argument("--peak", nargs=4, metavar=("SIDE", "B", "N", "L"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.peak:
        side, *size = options.peak
        print(peak(side, Size(*map(int, size))))
        return
    sides = [name for name in MODULES if _present(name)]
    print(", ".join(f"{name}: {value}" for name, value in describe().items()))
    for size in SIZES[:1] if options.quick else SIZES:
        _line(size, sides, options.rounds)


def runner(side: str, size: Size) -> Callable[[], list[torch.Tensor]]:
    """A function that gives log Z and the gradients of emissions and transitions."""
    torch.manual_seed(0)
    batch, words, tags = size
    emissions = torch.randn(batch, words, tags, requires_grad=True)
    transitions = torch.randn(tags, tags, requires_grad=True)
    lengths = torch.randint(words // 2, words + 1, (batch,))
    lengths[0] = words
    log_z = {"ffnas": _ffnas, "pytorch-crf": _pytorch_crf, "torch-struct": _torch_struct}[side](
        emissions, transitions, lengths
    )

    def run() -> list[torch.Tensor]:
        value = log_z()
        return [value.detach(), *torch.autograd.grad(value.sum(), (emissions, transitions))]

    return run


def _ffnas(emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor) -> Callable[[], torch.Tensor]:
    nothing = torch.zeros(len(transitions))
    return lambda: log_partition(Chain(emissions, transitions, nothing, nothing, lengths))


def _pytorch_crf(
    emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], torch.Tensor]:
    import torchcrf

    model = torchcrf.CRF(len(transitions), batch_first=True)
    del model.transitions
    model.transitions = transitions
    torch.nn.init.zeros_(model.start_transitions)
    torch.nn.init.zeros_(model.end_transitions)
    mask = torch.arange(emissions.shape[1]) < lengths[:, None]
    return lambda: model._compute_normalizer(emissions.transpose(0, 1), mask.T)


def _torch_struct(
    emissions: torch.Tensor, transitions: torch.Tensor, lengths: torch.Tensor
) -> Callable[[], torch.Tensor]:
    import torch_struct

    def log_z() -> torch.Tensor:
        # potentials [B, n - 1, to, from]; the first word's scores are in those of the first step
        steps = transitions.T[None, None] + emissions[:, 1:, :, None]
        first = torch.cat([emissions[:, :1, None, :], torch.zeros_like(emissions[:, 1:-1, None, :])], 1)
        return torch_struct.LinearChainCRF(steps + first, lengths=lengths).partition

    return log_z


def peak(side: str, size: Size) -> int:
    """Bytes that a pass needs at its peak; call it in a process of its own."""
    runner(side, Size(2, 3, size.tags))()  # libraries loaded
    return peak_bytes(runner(side, size))


def _line(size: Size, sides: Sequence[str], rounds: int) -> None:
    runs = {side: runner(side, size) for side in sides}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = runs["ffnas"]()
        for run in runs.values():
            for found, own in zip(run(), expected, strict=True):
                torch.testing.assert_close(found.double(), own.double(), rtol=1e-4, atol=1e-3)
        times = interleaved(runs, rounds)
    memory = {side: _peak_in_process(side, size) for side in sides}
    for side in sides:
        faster, more = times[side] / times["ffnas"], memory[side] / max(memory["ffnas"], 1)
        print(
            f"B {size.batch:3d}  n {size.words:4d}  L {size.tags:3d}  {side:13s} {times[side] * 1e3:8.3f} ms"
            f" ({faster:5.1f} x ffnas)  {memory[side] / 2**20:7.2f} MiB ({more:5.1f} x)",
            flush=True,
        )


def _peak_in_process(side: str, size: Size) -> float:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.crf", "--peak", side, *map(str, size)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(PROCESSES)
    ]
    return statistics.median(int(text) for text in found)


def _present(side: str) -> bool:
    try:
        importlib.import_module(MODULES[side])
    except ModuleNotFoundError:
        print(f"{side} is not installed: left out (pip install {side})")
        return False
    return True


if __name__ == "__main__":
    main()
