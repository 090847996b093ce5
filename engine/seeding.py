"""Seeds. Every phase and trial draws its own from the run's seed and its name, so that skipping finished work on
resume changes no later random number.

Rejected: one global generator for the whole run. Its state would have to be saved after every trial, and replaying
a finished trial without training it would leave the generator elsewhere.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive_seed(seed: int, *names: object) -> int:
    """A 63-bit seed from the run's seed and a path of names; equal input, equal output, on every platform."""
    digest = hashlib.sha256(repr((int(seed), *map(str, names))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
