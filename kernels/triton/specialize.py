"""Which code runs a call's program: the interpreting evaluator, with the program's device copy."""

from __future__ import annotations

from kernels.backends.base import FFNCall
from kernels.triton.device_program import DeviceProgram, device_program
from kernels.validation import checked_words


def program_of(call: FFNCall) -> DeviceProgram:
    """The program of a call, on its device."""
    return device_program(checked_words(call.program), call.x.device)
