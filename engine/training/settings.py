"""Settings of one training phase; plain data, so that reading a configuration loads no framework."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class PhaseSettings:
    """One training phase: AdamW, linear warm-up and decay, gradient clipping.

    Args:
        steps: optimizer steps (give this or epochs; 0 skips the phase).
        epochs: passes over the phase's data (give this or steps).
        batch_size: sequences per step, over all devices.
        accumulate: parts a step's batch is worked through in, one after the other on each device, to save memory;
            the result is that of the whole batch, up to rounding and dropout.
        lr: peak learning rate.
        weight_decay: decoupled weight decay; biases and LayerNorm are exempt.
        warmup_ratio: share of the steps with rising learning rate.
        clip: largest gradient norm.
        fraction: share of the data to use, drawn once with the run's seed.
        first: that share is the first one, in the order of the files, instead of a random one.
        sources: text: only the first so many sources of data.text (null: all).
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    clip: float = 1.0
    fraction: float = 1.0
    first: bool = False
    sources: int | None = None

    def total_steps(self, batches_per_epoch: int) -> int:
        """Optimizer steps of the phase over data of `batches_per_epoch` batches."""
        if self.steps is not None:
            return self.steps
        if self.epochs is None:
            raise ValueError("a phase needs steps or epochs")
        return math.ceil(self.epochs * batches_per_epoch)


@dataclass
class TargetSettings:
    """Where the teacher's answers are kept for phases that several models go through with the same batches.

    Args:
        cache: 'memory' (while they fit), 'disk' (a file, kept only if reading it is measured to be cheaper than a
            teacher pass; later runs find it again) or 'off'.
        dtype: on disk: 'exact' (as the teacher gave them) or 'bf16'.
        folder: of the files (null: 'targets' in the cache folder).
    """

    cache: str = "memory"
    dtype: str = "exact"
    folder: str | None = None
