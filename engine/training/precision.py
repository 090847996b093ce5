"""Device and precision: what `auto` means.

bf16 autocast pays only where the machine multiplies bf16 matrices much faster than fp32 ones and the gain exceeds the
casts. That is measured, once per run, on one encoder layer of the model's widths on the kernels that will run it; the
result is saved in the resolved configuration, so a resumed run does not measure again.

Rejected: asking the processor what it supports. bf16 instructions run at a quarter of the fp32 rate on some
processors that have them, and at eight times it on others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from engine.errors import UserError

MIN_SPEEDUP = 1.3
"""bf16 is taken only when its step is this many times faster: a margin wide enough for noisy timings."""

CLEAR = 3.0
"""Once one step takes this many times the other's time, nothing more is measured."""

_ROUNDS = 7


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one, else the CPU.

    Raises:
        UserError: the device is unknown or not usable here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is not a device: use auto, cpu or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: {name!r} is not supported: use auto, cpu or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device: {name!r} asks for CUDA, but this PyTorch ({torch.__version__}) finds no CUDA device:"
                " use --device cpu, or install a CUDA build and driver"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise UserError(f"device: {name!r} does not exist: this machine has {torch.cuda.device_count()}")
    return device


def choose_precision(
    name: str,
    device: torch.device,
    hidden_size: int,
    inner_size: int,
    num_heads: int,
    *,
    training: bool = True,
    batch: tuple[int, int] = (16, 64),
) -> str:
    """`"fp32"` or `"bf16"`; `auto` measures one encoder layer of these widths.

    Args:
        name: `"auto"`, `"fp32"` or `"bf16"`.
        device: where the models will run.
        hidden_size: H of the model.
        inner_size: width of its FFN.
        num_heads: of its attention; divides H.
        training: measure forward and backward; otherwise forward alone.
        batch: sequences and tokens per sequence of the measured step.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    with torch.random.fork_rng():
        step = _layer_step(hidden_size, inner_size, num_heads, training, batch)
        fp32, bf16 = _cpu_seconds(step)
    return "bf16" if fp32 > MIN_SPEEDUP * bf16 else "fp32"


def _layer_step(
    hidden_size: int, inner_size: int, num_heads: int, training: bool, batch: tuple[int, int]
) -> Callable[[bool], None]:
    """A function that runs one step of a layer, under bf16 autocast if given True."""
    from engine.student import FFNASConfig
    from engine.student.encoder import FFNASLayer, Planner

    config = FFNASConfig(
        vocab_size=8,
        hidden_size=hidden_size,
        intermediate_size=inner_size,
        num_hidden_layers=1,
        num_attention_heads=num_heads,
        attn_implementation="sdpa",
    )
    (plan,) = Planner(config).full
    layer = FFNASLayer(config, 0, plan).train(training)
    x = torch.randn(*batch, hidden_size)

    def step(bf16: bool) -> None:
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                out = layer(x, None, plan)[0]
            if training:
                out.float().square().mean().backward()

    return step


def _cpu_seconds(step: Callable[[bool], None]) -> tuple[float, float]:
    """Shortest seconds of a step in fp32 and in bf16.

    On one thread and in CPU time, which other processes on the machine hardly disturb; the shortest of several rounds
    is the least disturbed. Where one is `CLEAR` times slower (bf16 without units for it can be twenty times), the first
    measured round decides.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for round_number in range(_ROUNDS + 1):
            for bf16 in (False, True) if round_number % 2 else (True, False):
                began = time.thread_time()
                step(bf16)
                if round_number:  # the first round warms up
                    times[bf16].append(time.thread_time() - began)
            if round_number and not 1 / CLEAR < min(times[False]) / max(min(times[True]), 1e-9) < CLEAR:
                break
    finally:
        torch.set_num_threads(threads)
    return min(times[False]), min(times[True])
