"""EfficientBERT's published files: pickles with `state_dict`, read without running anything from them.

A file that was saved after fine-tuning holds its metrics too, as NumPy's float64 scalars. Those are the only objects
allowed beside what `torch.load(weights_only=True)` takes: the two functions a pickle of one calls, and the type whose
state the second one sets. Rejected: `weights_only=False`, for a file from the network; and cutting the metrics out of
the pickle, which would be a second pickle reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.errors import UserError
from engine.files import write_atomic

MODULE = "module."

_FLOAT64 = np.float64(0).__reduce__()[0]
NUMPY_SCALARS: list[Any] = [
    (_FLOAT64, "numpy.core.multiarray.scalar"),  # as NumPy 1 names it
    (_FLOAT64, "numpy._core.multiarray.scalar"),  # NumPy 2
    np.dtype,
    type(np.dtype(np.float64)),
]
"""What a pickled float64 scalar needs; every name stands for a function that makes numbers of bytes."""


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a published file, by name without `module.`; also those of a model's *.safetensors file.

    Raises:
        UserError: the file cannot be read without running code from it, or holds no state dict of float tensors.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return {name.removeprefix("ffnas."): tensor for name, tensor in load_file(path).items()}
        with torch.serialization.safe_globals(NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"checkpoint {path}: there is no such file: check the path") from error
    except Exception as error:  # of damaged pickles: IndexError, struct.error, AttributeError and more
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(
            f"checkpoint {path}: not a file of tensors ({reason:.160}): give a file whose `state_dict` torch.load"
            " reads with weights_only=True"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(_is_weight(n, t) for n, t in state.items()):
        raise UserError(f"checkpoint {path}: holds no `state_dict` of names and float tensors: give a model's file")
    tensors = {name.removeprefix(MODULE): tensor for name, tensor in state.items()}
    if len(tensors) != len(state):
        raise UserError(f"checkpoint {path}: the same names with and without {MODULE!r}: remove one of each")
    return tensors


def write_published(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Writes `{"state_dict": state}` as the published files are, whole or not at all."""
    with write_atomic(path) as temporary:
        torch.save({"state_dict": dict(state)}, temporary)


def _is_weight(name: Any, tensor: Any) -> bool:
    return isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
