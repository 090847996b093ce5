"""Programs on a device: one copy per program and device, made at the first call and kept with the program's tensor.

The kernels read the words of `kernels.program` as they are. A graph captured with one program runs another one after
`words.copy_(other)` on the device copy, if the other is no longer.

Rejected: words in kernel arguments. A graph would keep the program it was captured with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.validation import checked_words

_ATTRIBUTE = "_ffnas_cuda_copies"
_TEMPORARIES = 7
"""Header word: the most temporaries any segment uses."""


class DeviceProgram(NamedTuple):
    words: Tensor
    temporaries: int


def device_program(program: Tensor, device: torch.device) -> DeviceProgram:
    """The device's copy of a program (int32, on the CPU), and how many temporaries it uses.

    Not for the first time while a graph is captured: run the call once before, as captures ask for anyway.
    """
    version, copies = getattr(program, _ATTRIBUTE, (None, {}))
    if version != program._version:
        copies = {}
        setattr(program, _ATTRIBUTE, (program._version, copies))
    found = copies.get(device)
    if found is None:
        temporaries = checked_words(program)[_TEMPORARIES]
        words = program if device.type == "cpu" else program.to(device)
        found = copies[device] = DeviceProgram(words, temporaries)
    return found
