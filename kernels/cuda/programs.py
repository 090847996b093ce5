"""Programs on a device: one copy per program and device, made at the first call (`kernels.upload`).

The kernels read the words of `kernels.language.program` as they are, at every launch. A captured graph runs the program
it was captured with: these kernels do not read a `kernels.triton.device_program.ProgramBuffer`.

Rejected: words in kernel arguments. They outgrow the 4 KB a launch may carry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language.validation import checked_words
from kernels.upload import Copies, upload

CACHE_SIZE = 4096
"""Device copies kept; one takes about 1 KB."""
_TEMPORARIES = 7
"""Header word: the most temporaries any segment uses."""


class DeviceProgram(NamedTuple):
    words: Tensor
    temporaries: int


_copies: Copies[DeviceProgram] = Copies(CACHE_SIZE)


def device_program(program: Tensor, device: torch.device) -> DeviceProgram:
    """The device's copy of a program (int32, on the CPU), and how many temporaries it uses.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the program was never used on this device before.
    """
    words = checked_words(program)
    if device.type == "cpu":  # the emulation reads the tensor itself
        return DeviceProgram(program, words[_TEMPORARIES])
    return _copies.get(device, words, lambda: DeviceProgram(upload(program, device), words[_TEMPORARIES]))
