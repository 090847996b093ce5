"""The FFN op: both Triton tiers and the CUDA C++ routes against eager PyTorch and torch.compile.

Every side runs twice: captured in a CUDA graph and replayed, so that launch overhead counts for none, and called as it
is. Both run the same kernels. Times are CUDA events, medians of rounds in which the sides take turns. The floor of a
case is the larger of (FLOPs / rate of a large product) and (bytes of inputs and results / rate of a copy), both rates
measured in the same run.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.ffn_cases import DTYPES, Case
from benchmarks.gpu.records import Line, Records
from benchmarks.gpu.scale import Scale
from benchmarks.gpu.sides import BASELINES, OURS, floor, interleaved, rates, sides


def run(records: Records, scale: Scale, out: Path) -> None:
    del out
    names = [name for name in BASELINES if scale.full or name != "compile-max"]
    known: dict[str, tuple[float, float]] = {}
    for case in scale.ffn():
        dtype = case.autocast or case.dtype
        if dtype not in known:
            known[dtype] = rates(DTYPES[dtype], scale.device)
        records.case(str(case), lambda case=case, d=dtype: timed(case, [*names, *OURS], records, scale, known[d]))


def timed(case: Case, names: list[str], records: Records, scale: Scale, ceilings: tuple[float, float]) -> Line:
    """The case's fields, seconds by side, graphed and not, and why sides could not run."""
    name = str(case)
    graphs, plain, refused = sides(case, names, lambda side: records.attempt(name, side))
    records.attempt(name, None)
    found = {**vars(case), "refused": refused, "seconds": interleaved(graphs, scale.rounds, scale.device)}
    found["ungraphed"] = interleaved(plain, min(3, scale.rounds), scale.device)
    found["seconds"]["floor"] = floor(case, *ceilings)
    return found
