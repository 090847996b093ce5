"""How PyTorch's threads wait for one another on the CPU.

GNU OpenMP's threads spin for milliseconds at the end of every parallel region. Alone on a machine that saves 5 to 10 %;
beside another busy process the spinning thread takes the core the awaited one needs. Two processes on two cores: a
training step of 21 ms took 960 ms, with short spinning 36 ms (and 23 ms alone).

The variables are read when PyTorch is loaded. One the user has set wins.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = "1000"


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes waiting threads sleep soon; call before torch is imported."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
