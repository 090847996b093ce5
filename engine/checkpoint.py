"""Checkpoints: model weights as safetensors, and the state inside a training phase as one tensor-only file.

Files are written whole or not at all (`engine.files`) and read with `weights_only=True` or safetensors, so a
damaged or hostile file can never run code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.errors import UserError
from engine.files import write_atomic
from engine.parallel import ALONE, Ranks


def save_weights(path: Path, model: nn.Module) -> None:
    """Writes the parameters and persistent buffers of `model`; tensors shared by two names are stored once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach().cpu().contiguous()
    with write_atomic(path) as temporary:
        save_file(tensors, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """Reads what `save_weights` wrote into `model`.

    Raises:
        UserError: the file is missing, damaged, or belongs to another model.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path} is missing: start the run again, or restore the file") from error
    except SafetensorError as error:
        raise UserError(f"checkpoint {path} is damaged ({error}): delete it and resume") from error
    own = model.state_dict()
    shared = {t.data_ptr() for n, t in own.items() if n in tensors}
    missing = [n for n, t in own.items() if n not in tensors and t.data_ptr() not in shared]
    wrong = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
    if missing or wrong:
        raise UserError(
            f"checkpoint {path} does not fit the model: {len(missing)} missing, {len(wrong)} unexpected or of"
            f" another shape, first {(missing + wrong)[0]!r}: delete it and resume"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def save_training_state(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    step: int,
    extra: dict[str, Tensor],
    *,
    ranks: Ranks = ALONE,
) -> None:
    """Writes everything a phase needs to go on after `step` steps, bit for bit.

    Called by every rank: the first one writes, the generators of all are saved.
    """
    generators = ranks.gather(generator_state(ranks))
    if not ranks.is_first:
        return
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "extra": extra,
        "generators": generators,
    }
    with write_atomic(path) as temporary:
        torch.save(state, temporary)


def load_training_state(
    path: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, ranks: Ranks = ALONE
) -> tuple[int, dict[str, Tensor]]:
    """Restores what `save_training_state` wrote; returns the steps done and the extra tensors.

    Called by every rank: the first one reads and sends the file's content to the others. With another number of ranks
    than at the time of saving, ranks without a saved generator keep theirs.

    Raises:
        UserError: the file is damaged or belongs to another model.
    """
    source: Path | io.BytesIO = path
    if ranks.size > 1:
        source = io.BytesIO(ranks.send(path.read_bytes() if ranks.is_first else b""))
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        if ranks.rank < len(state["generators"]):
            set_generator_state(state["generators"][ranks.rank], ranks)
        return int(state["step"]), state["extra"]
    except (RuntimeError, KeyError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), "") or "it ends too early"
        raise UserError(f"checkpoint {path} cannot be used ({reason}): delete it and resume") from error


def generator_state(ranks: Ranks = ALONE) -> Tensor:
    """State of PyTorch's generators as one uint8 tensor: the CPU's, then those of this process's CUDA devices."""
    return torch.cat([torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in _devices(ranks))])


def set_generator_state(state: Tensor, ranks: Ranks = ALONE) -> None:
    """Inverse of `generator_state`; a device the state knows nothing of keeps its generator as it is."""
    cpu = torch.get_rng_state().numel()
    torch.set_rng_state(state[:cpu].clone())
    rest = state[cpu:]
    for device in _devices(ranks):
        size = torch.cuda.get_rng_state(device).numel()
        if len(rest) >= size:
            torch.cuda.set_rng_state(rest[:size].clone(), device)
        rest = rest[size:]


def _devices(ranks: Ranks) -> range:
    """CUDA devices whose generators this process uses: all there are, or the rank's own."""
    if not torch.cuda.is_available():
        return range(0)
    if ranks.size == 1:
        return range(torch.cuda.device_count())
    return range(torch.cuda.current_device(), torch.cuda.current_device() + 1)
