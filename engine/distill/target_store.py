"""The files of a target cache: where each record lies, how it is checked, who may use it.

    FOLDER/  meta.json (format, key, layout, size, measured seconds)   states.bin   sums.bin

A record holds one `EncoderStates`, at an offset known beforehand. `sums.bin` holds each record's CRC-32; a record
counts as written once its sum is there and fits. So a killed run leaves whole records, and one that was damaged since
is noticed at its first use. One process at a time (`flock`, given back by the kernel however the process ends).

Rejected: safetensors, one file per step. It knows no partly written file, and a phase has thousands of steps.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.files import write_json_atomic
from engine.states import EncoderStates

FORMAT = 2
_ALIGN = 64
Field = tuple[str, str, str, tuple[int, ...]]
ShapeOf = Callable[[int, int], tuple[int, ...]]
_WRITTEN = 1 << 32
_STATES, _SUMS, _META = "states.bin", "sums.bin", "meta.json"


@dataclass(frozen=True)
class Layout:
    """Where every record lies and what it holds.

    Attributes:
        fields: (kind, stored dtype, given dtype, sizes) of each tensor; kind is "states" [B, S, w], "heads"
            [B, heads, S, d] (stored as [B, S, heads, d], the memory layout models give) or "answers", of the task's own
            shape.
        shape_of: the answers' shape for (rows, columns), as `TaskHead.answer_shape` gives it.
        offsets: (step, part) -> first byte and (rows, columns).
        size: bytes of all records.
    """

    fields: list[Field]
    shape_of: ShapeOf
    offsets: dict[tuple[int, int], tuple[int, tuple[int, int]]]
    size: int

    @classmethod
    def of(
        cls, states: EncoderStates, shapes: dict[tuple[int, int], tuple[int, int]], shape_of: ShapeOf, dtype: str
    ) -> Layout:
        """The layout for answers like `states`."""
        fields = []
        for kind, tensor in _tensors(states):
            given = str(tensor.dtype).removeprefix("torch.")
            stored = "bfloat16" if dtype == "bf16" else given
            tail = {"states": tuple(tensor.shape[2:]), "heads": tuple(tensor.shape[1::2]), "answers": ()}[kind]
            fields.append((kind, stored, given, tail))
        return cls.at(fields, shapes, shape_of)

    @classmethod
    def at(cls, fields: Sequence[Any], shapes: dict[tuple[int, int], tuple[int, int]], shape_of: ShapeOf) -> Layout:
        """The layout of `fields` for batches of these shapes."""
        fields = [(kind, stored, given, tuple(tail)) for kind, stored, given, tail in fields]
        sizes: dict[tuple[int, int], int] = {}
        offsets, position = {}, 0
        for where, shape in shapes.items():
            if shape not in sizes:
                sizes[shape] = sum(_aligned(_bytes(f, shape, shape_of)) for f in fields)
            offsets[where] = (position, shape)
            position += sizes[shape]
        return cls(fields, shape_of, offsets, position)

    def views(self, buffer: Tensor, where: tuple[int, int]) -> list[Tensor]:
        """The record's tensors as views of `buffer` (uint8, the whole file)."""
        position, shape = self.offsets[where]
        views = []
        for field in self.fields:
            wanted = _shape(field, shape, self.shape_of)
            count = math.prod(wanted) * getattr(torch, field[1]).itemsize
            views.append(buffer[position : position + count].view(getattr(torch, field[1])).view(wanted))
            position += _aligned(count)
        return views

    def span(self, where: tuple[int, int]) -> tuple[int, int]:
        """First byte of a record and the one behind its last."""
        position, shape = self.offsets[where]
        return position, position + sum(_aligned(_bytes(f, shape, self.shape_of)) for f in self.fields)


class Damaged(Exception):
    """The files are not what was written; the message says in what way."""


class Store:
    """The mapped files of one key, locked against other processes while open."""

    def __init__(self, folder: Path, key: str, layout: Layout, handle: int) -> None:
        self.folder, self.key, self.layout = folder, key, layout
        self._handle = handle
        self._map = mmap.mmap(handle, max(1, layout.size))
        self._buffer = torch.frombuffer(self._map, dtype=torch.uint8)
        self._index = {where: number for number, where in enumerate(layout.offsets)}
        self._sums = np.memmap(folder / _SUMS, dtype=np.uint64, mode="r+", shape=(max(1, len(self._index)),))
        self._trusted: set[tuple[int, int]] = set()

    @classmethod
    def create(cls, folder: Path, key: str, layout: Layout) -> Store:
        """New files of full size; `OSError` if the disk refuses."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _META).unlink(missing_ok=True)
        handle = os.open(folder / _STATES, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(handle, 0, max(1, layout.size))
            with open(folder / _SUMS, "wb") as file:
                file.write(bytes(8 * max(1, len(layout.offsets))))
            return cls(folder, key, layout, handle)
        except BaseException:
            os.close(handle)
            raise

    @classmethod
    def open(
        cls, folder: Path, key: str, shapes: dict[tuple[int, int], tuple[int, int]], shape_of: ShapeOf
    ) -> Store | None:
        """The files of an earlier use; None where there are none.

        Raises:
            Damaged: they are not whole.
            BlockingIOError: another process has them open.
        """
        if not folder.exists():
            return None
        handle: int | None = None
        try:
            handle = os.open(folder / _STATES, os.O_RDWR)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            meta = json.loads((folder / _META).read_text(encoding="utf-8"))
            if meta["format"] != FORMAT or meta["key"] != key:
                raise Damaged(f"{_META} belongs to another cache")
            layout = Layout.at(meta["fields"], shapes, shape_of)
            for name, size in ((_STATES, layout.size), (_SUMS, 8 * len(shapes))):
                if (folder / name).stat().st_size != size:
                    raise Damaged(f"{name} is not {size} bytes long")
            return cls(folder, key, layout, handle)
        except BaseException as error:
            if handle is not None:
                os.close(handle)
            if isinstance(error, BlockingIOError):
                raise
            if isinstance(error, FileNotFoundError):
                raise Damaged(f"{Path(error.filename).name} is missing") from error
            if isinstance(error, (OSError, ValueError, KeyError, TypeError, AttributeError)):
                raise Damaged(f"{_META} cannot be read") from error
            raise

    def finish_creation(self, seconds: dict[str, float]) -> None:
        """Writes meta.json, without which the files count for nothing."""
        fields, size = self.layout.fields, self.layout.size
        meta = {"format": FORMAT, "key": self.key, "bytes": size, "fields": fields, "seconds": seconds}
        write_json_atomic(self.folder / _META, meta)

    def is_written(self, where: tuple[int, int]) -> bool:
        """Whether a record was written, whole or damaged since."""
        return bool(self._sums[self._index[where]])

    def write(self, where: tuple[int, int], states: EncoderStates) -> None:
        """Stores a record, then its sum."""
        number = self._index[where]
        self._sums[number] = 0
        for view, (kind, tensor) in zip(self.layout.views(self._buffer, where), _tensors(states), strict=True):
            view.copy_(tensor.transpose(1, 2) if kind == "heads" else tensor)
        self._sums[number] = _WRITTEN | self._sum(where)

    def read(self, where: tuple[int, int], device: torch.device) -> EncoderStates | None:
        """A record on `device` (on the CPU: views of the file), None if it is not there or damaged."""
        if where not in self._trusted:
            if int(self._sums[self._index[where]]) != _WRITTEN | self._sum(where):
                return None
            self._trusted.add(where)
        found: dict[str, list[Tensor]] = {"states": [], "queries": [], "keys": [], "answers": []}
        heads = sum(kind == "heads" for kind, *_ in self.layout.fields) // 2
        for view, (kind, _, given, _) in zip(self.layout.views(self._buffer, where), self.layout.fields, strict=True):
            tensor = view.to(device=device, dtype=getattr(torch, given))
            if kind == "heads":
                kind = "queries" if len(found["queries"]) < heads else "keys"
                tensor = tensor.transpose(1, 2)
            found[kind].append(tensor)
        embeddings, *hidden = found["states"]
        logits = found["answers"][0] if found["answers"] else None
        return EncoderStates(embeddings, tuple(hidden), tuple(found["queries"]), tuple(found["keys"]), logits)

    def drop_pages(self) -> None:
        """Writes everything out and forgets it, so that the next read comes from the disk where the system allows."""
        self._map.flush()
        if hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise"):
            self._map.madvise(mmap.MADV_DONTNEED)
            os.fsync(self._handle)
            os.posix_fadvise(self._handle, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Gives the lock back; the mapping, which shares it, ends with the last tensor that views it."""
        fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)

    def _sum(self, where: tuple[int, int]) -> int:
        first, behind = self.layout.span(where)
        return zlib.crc32(self._buffer[first:behind].numpy().data)


def _tensors(states: EncoderStates) -> list[tuple[str, Tensor]]:
    """The tensors of `states` with their kind, in the order they are stored."""
    found = [("states", t) for t in (states.embeddings, *states.hidden)]
    found += [("heads", t) for t in (*states.queries, *states.keys)]
    return found if states.logits is None else [*found, ("answers", states.logits)]


def _shape(field: Field, shape: tuple[int, int], shape_of: ShapeOf) -> tuple[int, ...]:
    return shape_of(*shape) if field[0] == "answers" else (*shape, *field[3])


def _bytes(field: Field, shape: tuple[int, int], shape_of: ShapeOf) -> int:
    return math.prod(_shape(field, shape, shape_of)) * getattr(torch, field[1]).itemsize


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
