"""Size and speed of finished models on this machine: parameters, bytes on disk, milliseconds of a forward pass.

Every model runs in eager PyTorch and, if it is one of ours and there are kernels, on those too; float32, full
sequences, threads as they are set, in turns, medians (`engine.latency.models.interleaved`). A slow machine gets fewer
rounds, not a longer wait. `ffnas latency` measures more, at length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from engine.latency.models import SLICE, interleaved
from engine.student.modeling import FFNASPreTrainedModel
from kernels.dispatch import preferred_backend, use_backend

BATCHES = (1, 32)
LENGTH = 64
SECONDS = 15.0
ROUNDS = 7
EAGER, KERNELS = "eager", "kernels"
_NOT_ENCODER = ("embeddings", "pooler", "fit_dense", "cls_pooler")
"""Parts of a base model that are not its layers."""


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one forward pass of a batch.

    Attributes:
        model: its name.
        side: `eager` or `kernels`.
        batch, length: sequences, and tokens of each.
        milliseconds: of the whole batch.
    """

    model: str
    side: str
    batch: int
    length: int
    milliseconds: float

    def to_dict(self) -> dict[str, Any]:
        """Without the model's name, as JSON."""
        values = asdict(self)
        del values["model"]
        return values


def parameters(model: nn.Module) -> dict[str, int]:
    """`encoder`: of the layers alone, without embeddings, pooler and head; `total`: of all that is deployed.

    `fit_dense`, which only distillation needs, is not counted.
    """
    base = getattr(model, "base_model", model)
    encoder = sum(p.numel() for name, p in base.named_parameters() if name.split(".")[0] not in _NOT_ENCODER)
    total = sum(p.numel() for name, p in model.named_parameters() if "fit_dense" not in name.split("."))
    return {"encoder": encoder, "total": total}


def bytes_on_disk(folder: Path | None) -> int | None:
    """Size of `model.safetensors` in a model directory; None where there is none."""
    path = None if folder is None else folder / "model.safetensors"
    return path.stat().st_size if path is not None and path.is_file() else None


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    length: int,
    choices: int = 1,
    batches: tuple[int, ...] = BATCHES,
    seconds: float = SECONDS,
) -> list[Timing]:
    """Times the models in turns, batch size after batch size.

    Args:
        models: by name, each on its device; put into eval mode and left there.
        length: tokens per sequence.
        choices: sequences per row, of multiple choice; a batch of B has B * choices sequences.
        batches: batch sizes.
        seconds: about how long it may take in all. Each model runs at least twice per batch size, however long that
            takes; a model whose second pass leaves no time for more rounds reports that pass.
    """
    found: list[Timing] = []
    ends = time.perf_counter() + seconds
    for place, batch in enumerate(batches):
        share = max(0.0, ends - time.perf_counter()) / (len(batches) - place)
        shape = (batch, length) if choices == 1 else (batch, choices, length)
        runs = {(name, side): run for name, model in models.items() for side, run in _runs(model, shape).items()}
        for (name, side), took in _medians(runs, share).items():
            found.append(Timing(name, side, batch, length, 1e3 * took))
    return found


def _medians(runs: Mapping[tuple[str, str], Callable[[], object]], seconds: float) -> dict[tuple[str, str], float]:
    """Seconds of one call of each, medians over the rounds there is time for."""
    began = time.perf_counter()
    once: dict[tuple[str, str], float] = {}
    for key, run in runs.items():
        run()  # packs weights
        start = time.perf_counter()
        run()
        once[key] = time.perf_counter() - start
    left = seconds - (time.perf_counter() - began) - sum(once.values())
    rounds = min(ROUNDS, int(left / max(1e-9, sum(max(SLICE, took) for took in once.values()))))
    if rounds < 1:
        return once
    return {key: median(values) for key, values in interleaved(runs, rounds).items()}


def _runs(model: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """A forward pass per side; the device has finished it when the call returns."""
    device = next(model.parameters()).device
    model.eval()
    vocabulary = int(model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, shape, generator=generator).to(device)
    mask = torch.ones_like(ids)

    def kernels() -> object:
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask, return_dict=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return out

    def eager() -> object:
        with use_backend("reference"):
            return kernels()

    ours = isinstance(model, FFNASPreTrainedModel) and preferred_backend(device.type) != "reference"
    return {EAGER: eager, KERNELS: kernels} if ours else {EAGER: eager}
