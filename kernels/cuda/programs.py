"""Programs on a device: one copy per program and device, made at the first call and kept with the program's tensor.

The kernels read the words of `kernels.language.program` as they are, at every launch, and are launched with room for
all 16 temporaries while a graph is captured: such a graph runs another program of the same form and flags after its
words were copied over those of the device copy, if they are no more.

Rejected: words in kernel arguments. A graph would keep the program it was captured with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.language.validation import checked_words
from kernels.upload import upload

_ATTRIBUTE = "_ffnas_cuda_copies"
_TEMPORARIES = 7
"""Header word: the most temporaries any segment uses."""


class DeviceProgram(NamedTuple):
    words: Tensor
    temporaries: int


def device_program(program: Tensor, device: torch.device) -> DeviceProgram:
    """The device's copy of a program (int32, on the CPU), and how many temporaries it uses.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the program was never used on this device before.
    """
    version, copies = getattr(program, _ATTRIBUTE, (None, {}))
    if version != program._version:
        copies = {}
        setattr(program, _ATTRIBUTE, (program._version, copies))
    found = copies.get(device)
    if found is None:
        found = copies[device] = DeviceProgram(upload(program, device), checked_words(program)[_TEMPORARIES])
    return found
