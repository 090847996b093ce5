"""Sides, clocks and floors of the GPU benchmark. On a CPU everything runs without graphs, and eager
in place of torch.compile: a rehearsal of the code.

eager, compile, compile-max   plain PyTorch, torch.compile (default, max-autotune-no-cudagraphs)
liger                         eager with Liger-Kernel's LayerNorm, where that is installed
triton interpreter            the precompiled tier
triton specialized            generated code
cuda rows                     Triton's products, CUDA C++ for whole rows
cuda stack                    the whole FFN in one CUDA C++ kernel
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from benchmarks.ffn_cases import COMPILE_MODES, DTYPES, Case, inputs, runner
from benchmarks.gpu.records import LOST, refusal
from kernels import parse_expression, use_backend
from kernels.reference.ffn import ffn

OURS = {
    "triton interpreter": ("triton", {"FFNAS_SPECIALIZE": "0"}),
    "triton specialized": ("triton", {"FFNAS_SPECIALIZE": "always"}),
    "cuda rows": ("cuda", {"FFNAS_CUDA_ROUTE": "rows", "FFNAS_SPECIALIZE": "0"}),
    "cuda stack": ("cuda", {"FFNAS_CUDA_ROUTE": "stack", "FFNAS_SPECIALIZE": "0"}),
}
"""Side -> backend and environment. The environment is read per call, so it must hold while a graph is captured."""
BASELINES = ("eager", "compile", "compile-max", "liger")
WARM_UPS = 3


@contextmanager
def setting(name: str) -> Iterator[None]:
    """The backend and environment of one of `OURS`; nothing for a baseline."""
    backend, environment = OURS.get(name, (None, {}))
    before = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        with use_backend(backend, strict=True) if backend else nullcontext():
            yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)


def graphed(run: Callable[[], object], name: str, device: str) -> Callable[[], object]:
    """`run` of side `name` captured in a CUDA graph. Call it within the side's `setting`."""
    if device != "cuda":
        run()  # a side that cannot serve says so here, as on a device
        return _within(name, run)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(_inputs: object = run) -> None:
        """Replays; holds on to `run`, since the graph reads its tensors where they are."""
        graph.replay()

    return replay


def _within(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` in the side's setting, which is read at every call."""

    def call() -> object:
        with setting(name):
            return run()

    return call


def sides(
    case: Case, names: Sequence[str], attempt: Callable[[str], bool] = lambda _: True
) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]], dict[str, str]]:
    """(graphs by side, ungraphed runs by side, reason by side that cannot serve).

    Args:
        attempt: told of every side before it is made; False leaves it out.
    """
    graphs, plain, refused = {}, {}, {}
    for name in names:
        if not attempt(name):
            refused[name] = LOST
            continue
        try:
            with setting(name):
                run = liger(case) if name == "liger" else runner(case, _kind(name, case))
                graph = graphed(run, name, case.device)
                graph()
                if case.device == "cuda":
                    torch.cuda.synchronize()  # what goes wrong in the kernels goes wrong here
            graphs[name], plain[name] = graph, _within(name, run)
        except Exception as error:  # a side that cannot run, for whatever reason, is part of the result
            refused[name] = refusal(error)
    return graphs, plain, refused


def _kind(name: str, case: Case) -> str:
    """The side of `benchmarks.ffn_cases`; a rehearsal does not wait for torch.compile."""
    if name in OURS:
        return "ffnas"
    return "eager" if case.device == "cpu" and name in COMPILE_MODES else name


def liger(case: Case) -> Callable[[], object]:
    """Eager PyTorch with Liger-Kernel's LayerNorm; Liger has no FFN with separate first product and activation."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    tensors, expression = inputs(case), parse_expression(case.expression)

    def forward(x: Tensor, *rest: Tensor) -> Tensor:
        body = ffn(x, *rest[:4], None, None, expression, return_ln=False)
        return LigerLayerNormFunction.apply(x + body, *rest[4:], 1e-12)

    if not case.backward:
        return torch.no_grad()(lambda: forward(*tensors))
    weight = torch.ones_like(tensors[0])
    return lambda: torch.autograd.grad(forward(*tensors), tensors, weight)


def interleaved(graphs: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds per replay; every timed stretch lasts about 10 ms."""
    warm = 3 if device == "cuda" else 1
    repeats = {name: max(1, round(0.01 / max(seconds(g, warm, device) / warm, 1e-7))) for name, g in graphs.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    order = list(graphs)
    for _ in range(rounds):
        for name in order:
            times[name].append(seconds(graphs[name], repeats[name], device) / repeats[name])
        order.reverse()
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(run: Callable[[], object], count: int, device: str) -> float:
    """Seconds of `count` runs, by CUDA events or by the clock."""
    if device != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """(FLOP/s of a large square product, bytes/s of a large copy, read and written)."""
    size, words = (8192, 2**28) if device == "cuda" else (256, 2**16)
    a = torch.randn(size, size, device=device, dtype=dtype)
    product = min(seconds(lambda: torch.mm(a, a), 5, device) / 5 for _ in range(3))
    b = torch.ones(words, device=device, dtype=torch.float32)
    c = torch.empty_like(b)
    copy = min(seconds(lambda: c.copy_(b), 5, device) / 5 for _ in range(3))
    return 2 * size**3 / product, 2 * 4 * words / copy


def floor(case: Case, flops: float, bandwidth: float) -> float:
    """Seconds no implementation can go below: see `benchmarks.gpu`."""
    t, h, d = case.tokens, case.hidden, case.inner
    products = 4 * t * h * d * (3 if case.backward else 1)
    size = torch.empty(0, dtype=DTYPES[case.dtype]).element_size()
    moved = size * (2 * t * h + 2 * h * d) * (2 if case.backward else 1)
    return max(products / flops, moved / bandwidth)
