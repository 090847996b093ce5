"""Checkpoints: model weights as safetensors, and the state inside a training phase as one tensor-only file.

Files are written whole or not at all (`engine.files`) and read with `weights_only=True` or safetensors, so a
damaged or hostile file can never run code. Each carries the SHA-256 of its content (weights in the safetensors
header, training states behind their last byte), which is checked before anything is taken from it, and has a second
copy: the weights a hidden one beside them, a training state the one before it. Where the first is damaged or lost, the
other is used and one line says so.

Rejected: a list of checksums beside the files. It is replaced in a second step, so that a kill in between makes a
sound file look damaged.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from engine.errors import UserError
from engine.files import copy_atomic, write_atomic
from engine.training.parallel import ALONE, Ranks

_log = logging.getLogger("ffnas.checkpoint")

_SUM = "sha256"
_SEAL = b"ffnas-sha256"
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size


class Damaged(UserError):
    """A file and its second copy are missing or not what was written."""


def untrained(model: nn.Module) -> set[str]:
    """Names of the parameters that are not trained, which whoever goes on has from elsewhere."""
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def save_weights(path: Path, model: nn.Module, *, without: Collection[str] = ()) -> None:
    """Writes the parameters and persistent buffers of `model`, twice; tensors shared by two names are stored once.

    Those named in `without` are left out: the model they are read into has them already.
    """
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if name in without or (tensor.data_ptr() in seen and tensor.numel()):
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach().cpu().contiguous()
    with write_atomic(path) as temporary:
        save_file(tensors, temporary, metadata={_SUM: _content_sum(tensors)})
    copy_atomic(path, second_copy(path))


def load_weights(path: Path, model: nn.Module, *, without: Collection[str] = ()) -> None:
    """Reads what `save_weights` wrote into `model`; a damaged or lost file is made again from its second copy.

    Tensors named in `without` need not be in the file and stay as they are then.

    Raises:
        Damaged: neither the file nor its copy can be used.
        UserError: they belong to another model.
    """
    copy = second_copy(path)
    try:
        tensors = _read_weights(path)
    except _Unsound as problem:
        try:
            tensors = _read_weights(copy)
        except _Unsound as second:
            raise Damaged(f"checkpoint {path} {problem}, and its copy {second}: delete both and resume") from second
        _log.warning("checkpoint %s %s: its copy is used", path, problem)
        copy_atomic(copy, path)
    own = model.state_dict()
    shared = {t.data_ptr() for n, t in own.items() if n in tensors}
    missing = [n for n, t in own.items() if n not in tensors and n not in without and t.data_ptr() not in shared]
    wrong = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
    if missing or wrong:
        raise UserError(
            f"checkpoint {path} does not fit the model: {len(missing)} missing, {len(wrong)} unexpected or of"
            f" another shape, first {(missing + wrong)[0]!r}: delete it and resume"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def sound_weights(path: Path) -> bool:
    """Whether `load_weights` finds a whole file at `path` or beside it."""
    for candidate in (path, second_copy(path)):
        try:
            _read_weights(candidate)
        except _Unsound:
            continue
        return True
    return False


def remove_weights(path: Path) -> None:
    """Removes what `save_weights` wrote; nothing there is no error."""
    second_copy(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def second_copy(path: Path) -> Path:
    """Where the second copy of the weights at `path` lies."""
    return path.with_name(f".{path.name}.copy")


def previous_state(path: Path) -> Path:
    """Where the training state before the one at `path` lies."""
    return path.with_name(f"{path.name}.previous")


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
    """Writes everything a phase needs to go on after `step` steps, bit for bit; the state before it is kept.

    Called by every rank: the first one writes, the generators of all are saved. Parameters that are not trained are
    left out: whoever goes on has made the same model.
    """
    generators = ranks.gather(generator_state(ranks))
    if not ranks.is_first:
        return
    same = untrained(model)
    state = {
        "step": step,
        "model": {name: tensor for name, tensor in model.state_dict().items() if name not in same},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "extra": extra,
        "generators": generators,
    }
    with write_atomic(path, previous=previous_state(path)) as temporary, open(temporary, "wb") as file:
        writer = _Sealing(file)
        try:
            torch.save(state, cast("IO[bytes]", writer))
        except RuntimeError as error:  # torch reports a refused write as a wrong position in its archive
            raise writer.refused or error from error
        writer.seal()


def has_training_state(path: Path) -> bool:
    """Whether `load_training_state` has something to try."""
    return path.exists() or previous_state(path).exists()


def remove_training_state(path: Path) -> None:
    """Removes what `save_training_state` wrote; nothing there is no error."""
    path.unlink(missing_ok=True)
    previous_state(path).unlink(missing_ok=True)


def load_training_state(
    path: Path, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, ranks: Ranks = ALONE
) -> tuple[int, dict[str, Tensor]]:
    """Restores what `save_training_state` wrote; returns the steps done and the extra tensors.

    Called by every rank: the first one reads and sends the file's content to the others. With another number of ranks
    than at the time of saving, ranks without a saved generator keep theirs. Where the state is damaged the one before
    it is taken; where both are, nothing is restored and 0 steps are done.

    Raises:
        UserError: the file belongs to another model.
    """
    content = _read_sealed(path) if ranks.is_first else b""
    content = ranks.send(content) if ranks.size > 1 else content
    if not content:
        return 0, {}
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        own, same = model.state_dict(), untrained(model)
        model.load_state_dict({**{name: own[name] for name in same}, **state["model"]})
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


class _Unsound(Exception):
    """A file is missing or not what was written; the message follows its name."""


class _Sealing:
    """A file open for writing that hashes what goes through and remembers why a write was refused."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.refused: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.refused = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def seal(self) -> None:
        """Appends the checksum. `torch.load` ignores what follows its archive."""
        self.file.write(_SEAL + self.digest.digest())


def _read_sealed(path: Path) -> bytes:
    """Content of the training state at `path`, or of the one before it; b"" if neither is sound."""
    previous = previous_state(path)
    for candidate, remedy in ((path, "the one before it is used"), (previous, "the phase begins anew")):
        try:
            content = candidate.read_bytes()
        except FileNotFoundError:
            continue
        body, seal = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
        if seal == _SEAL + hashlib.sha256(body).digest():
            return body
        if candidate == path and not previous.exists():
            remedy = "the phase begins anew"
        _log.warning("checkpoint %s is damaged: %s", candidate, remedy)
    return b""


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(os.fspath(path), "pt") as file:
            expected = (file.metadata() or {}).get(_SUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    except FileNotFoundError as error:
        raise _Unsound("is missing") from error
    except (SafetensorError, UnicodeDecodeError) as error:
        raise _Unsound(f"is damaged ({error})") from error
    if expected != _content_sum(tensors):
        raise _Unsound("is damaged (its checksum is wrong)")
    return tensors


def _content_sum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _devices(ranks: Ranks) -> range:
    """CUDA devices whose generators this process uses: all there are, or the rank's own."""
    if not torch.cuda.is_available():
        return range(0)
    if ranks.size == 1:
        return range(torch.cuda.device_count())
    return range(torch.cuda.current_device(), torch.cuda.current_device() + 1)
