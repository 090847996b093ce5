"""The teacher's answers on disk: read instead of passing the teacher again, where that is measured to be cheaper.

One folder per key (`engine.distill.target_store`). The key covers what decides the answers: weights and configuration
of the teacher, its precision, the encoded data, the batch plan with this process's share of it, and the layer map. The
plan also says how large every batch is, so the size of the whole is known, stated and checked before it is written.

Tensors are stored in the dtype the teacher gave ("exact": training equals that without a cache bit for bit) or in
bfloat16. Records are large, (2 + 3·L)·B·S·H values: 0.5 GB for the paper's batch of 128 x 128 tokens in bfloat16. So
reading is timed against one teacher pass before the file is filled, the page cache dropped first, and a file that does
not pay is removed. One thread of a 2-core CPU, local disk, six matched layers, exact, checksum included: BERT-base in
fp32, 16 x 128 tokens, 114 MiB a record: 97 ms against 4600 ms of teacher; in bf16 75 against 1610 ms.

Rejected: keeping hidden states only and computing queries and keys from them. It saves 2·L of 3·L + 2 tensors and
needs each family's projections by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine.data import Batch, EncodedDataset
from engine.data.batching import plan_batches
from engine.distill.target_store import FORMAT, Damaged, Layout, Store
from engine.errors import UserError
from engine.states import EncoderStates

if TYPE_CHECKING:
    from engine.distill import Distiller, TeacherTargets
    from engine.teacher import Teacher


@dataclass(frozen=True)
class BatchPlan:
    """The parts of a phase's batches that this process will ask for; batches as `engine.training.loop.cycle` makes
    them.

    Attributes:
        data: encoded sequences.
        batch_size: sequences per step, over all ranks.
        seed: of the order.
        steps: optimizer steps.
        micro_batches: parts per step and rank.
        rank, ranks: this process among those that train together.
    """

    data: EncodedDataset
    batch_size: int
    seed: int
    steps: int
    micro_batches: int = 1
    rank: int = 0
    ranks: int = 1

    def key(self) -> list[Any]:
        """Plain values that decide the parts."""
        numbers = (self.batch_size, self.seed, self.steps, self.micro_batches, self.rank, self.ranks)
        return [self.data.fingerprint(), *numbers]

    def shapes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(step, part) -> (sequences, columns), in the order of use (`engine.data.parts.split`)."""
        found: dict[tuple[int, int], tuple[int, int]] = {}
        lengths, count = self.data.lengths, self.ranks * self.micro_batches
        step = 0
        for epoch in range(math.ceil(self.steps / max(1, self.data.num_batches(self.batch_size)))):
            for rows in plan_batches(lengths, batch_size=self.batch_size, seed=self.seed, epoch=epoch):
                if step == self.steps:
                    break
                first = self.rank * self.micro_batches
                sizes = [len(range(first + part, len(rows), count)) for part in range(self.micro_batches)]
                width = int(lengths[rows].max())
                for part, size in enumerate([s for s in sizes if s] or [1]):
                    found[step, part] = (size * self.data.choices, width)
                step += 1
        return found


class DiskTargets:
    """Teacher's answers kept in a file; takes the place of `engine.distill.TeacherTargets`.

    Args:
        distiller: whose teacher answers.
        need_logits: whether the prediction term will be used.
        plan: what will be asked for; anything else is computed and not kept.
        folder: holds one folder per key.
        dtype: "exact" or "bf16".
        note: told one line when a file is made, refused as too slow, or found damaged.
        cheaper: decides from the seconds of reading one batch and of one teacher pass whether to keep the file.

    Raises:
        UserError: on first use, if the disk lacks room.
    """

    def __init__(
        self,
        distiller: Distiller,
        *,
        need_logits: bool,
        plan: BatchPlan,
        folder: Path,
        dtype: str = "exact",
        note: Callable[[str], None] = lambda line: None,
        cheaper: Callable[[float, float], bool] = lambda read, compute: read < compute,
    ) -> None:
        self.distiller = distiller
        self.need_logits = need_logits
        self.dtype = dtype
        self.note = note
        self.cheaper = cheaper
        details = [FORMAT, need_logits, dtype, distiller.layers, distiller.teacher_precision, distiller.device.type]
        identity = [teacher_hash(distiller.teacher), *details, *plan.key()]
        self.key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        self.folder = folder / self.key
        self.shapes = plan.shapes()
        self.shape_of = partial(distiller.spec.head.answer_shape, distiller.spec)
        self._store: Store | None = None
        self._begun = False

    def get(self, step: int, batch: Batch) -> EncoderStates:
        """The teacher's answer for a part of the batch of `step`; the same batch for the same step and part."""
        where = (step, batch.part)
        if where in self.shapes and self.shapes[where] != tuple(batch.mask.shape):
            raise ValueError(f"target cache: step {step} is {tuple(batch.mask.shape)}, not {self.shapes[where]}")
        if not self._begun:
            self._begin(where, batch)
        if self._store is None or where not in self.shapes:
            return self._compute(batch)
        states = self._store.read(where, self.distiller.device)
        if states is None:
            if self._store.is_written(where):
                self.note(f"teacher targets {self.folder}: step {step} is damaged: computed again")
            states = self._compute(batch)
            self._store.write(where, states)
        return states

    def close(self) -> None:
        """Gives the files back to other processes; later answers are computed."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def _compute(self, batch: Batch) -> EncoderStates:
        return self.distiller.targets(batch, need_logits=self.need_logits)

    def _begin(self, where: tuple[int, int], batch: Batch) -> None:
        """Opens the file, or makes one if the disk has room and reading is cheaper than the teacher."""
        self._begun = True
        if where not in self.shapes:
            return
        try:
            self._store = Store.open(self.folder, self.key, self.shapes, self.shape_of)
        except Damaged as problem:
            self.note(f"teacher targets {self.folder}: {problem}: made again")
            shutil.rmtree(self.folder)
        except BlockingIOError:
            self.note(f"teacher targets {self.folder}: in use by another process: computed without them")
            return
        if self._store is not None:
            return
        states = self._compute(batch)
        layout = Layout.of(states, self.shapes, self.shape_of, self.dtype)
        self._check_room(layout.size)
        self.note(f"teacher targets: {layout.size / 2**30:.2f} GiB ({self.dtype}) in {self.folder}")
        try:
            store = Store.create(self.folder, self.key, layout)
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise UserError(
                f"targets.folder {self.folder.parent}: {layout.size / 2**30:.2f} GiB cannot be written"
                f" ({error.strerror}): choose another place, or targets.cache memory"
            ) from error
        store.write(where, states)
        store.drop_pages()
        compute = _seconds(lambda: self._compute(batch), self.distiller.device)
        read = _seconds(lambda: store.read(where, self.distiller.device), self.distiller.device)
        if self.cheaper(read, compute):
            store.finish_creation({"read": read, "compute": compute})
            self._store = store
            return
        timing = f"reading a batch took {read * 1e3:.1f} ms and the teacher {compute * 1e3:.1f} ms"
        self.note(f"teacher targets: not kept, {timing}")
        store.close()
        shutil.rmtree(self.folder)

    def _check_room(self, size: int) -> None:
        place = self.folder.parent
        place.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place).free
        if size > free:
            raise UserError(
                f"targets.folder {place}: the teacher's answers need {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB"
                " are free: choose another place, targets.dtype bf16, or targets.cache memory"
            )


class PartTargets:
    """The teacher's answers in memory, for steps of several parts: a store of its own for each part.

    Args:
        make: gives an empty `engine.distill.TeacherTargets`.
    """

    def __init__(self, make: Callable[[], TeacherTargets]) -> None:
        self._make = make
        self._of_part: dict[int, TeacherTargets] = {}

    def get(self, step: int, batch: Batch) -> EncoderStates:
        """The teacher's answer for a part of the batch of `step`; the same batch for the same step and part."""
        if batch.part not in self._of_part:
            self._of_part[batch.part] = self._make()
        return self._of_part[batch.part].get(step, batch)


def teacher_hash(teacher: Teacher) -> str:
    """sha256 (hex) of the teacher's configuration and weights, by name."""
    config = {k: v for k, v in teacher.model.config.to_dict().items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(teacher.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of `work`, device included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else contextlib.nullcontext
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began
