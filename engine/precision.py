"""Device and precision: what `auto` means.

bf16 autocast pays only where the machine multiplies bf16 matrices much faster than fp32 ones and the gain exceeds
the casts. That is measured, once per run, on a training step of an FFN of the student's size; the result is saved in
the resolved configuration, so a resumed run does not measure again.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from engine.errors import UserError

MIN_SPEEDUP = 1.3
"""bf16 is taken only when its step is this many times faster: a margin wide enough for noisy timings."""

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


def choose_precision(name: str, device: torch.device, hidden_size: int, inner_size: int, tokens: int = 1024) -> str:
    """`"fp32"` or `"bf16"`; `auto` measures a training step of one FFN of the student's widths.

    Args:
        name: `"auto"`, `"fp32"` or `"bf16"`.
        device: where the models will run.
        hidden_size: H of the student.
        inner_size: F of the student.
        tokens: rows of the measured step.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    model = nn.Sequential(
        nn.Linear(hidden_size, inner_size), nn.GELU(approximate="tanh"), nn.Linear(inner_size, hidden_size)
    )
    x = torch.ones(tokens, hidden_size)
    times: dict[bool, list[float]] = {False: [], True: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # CPU time of one thread: other processes on the machine hardly disturb it
    for round_number in range(_ROUNDS + 1):
        for enabled in (False, True) if round_number % 2 else (True, False):
            began = time.thread_time()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = model(x).float().square().mean()
            loss.backward()
            if round_number:
                times[enabled].append(time.thread_time() - began)
    torch.set_num_threads(threads)
    return "bf16" if min(times[False]) > MIN_SPEEDUP * min(times[True]) else "fp32"  # min: least disturbed rounds
