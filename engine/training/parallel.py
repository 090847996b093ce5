"""Ranks: the processes `torchrun` starts for one run, and what they say to one another.

Every rank walks through the same phases. Training phases are data parallel (`Ranks.data_parallel`, torch's
DistributedDataParallel), candidates are shared out one by one (`engine.training.claims`); everything else is done by
the first rank alone while the others wait (`Ranks.first`, `Ranks.agree`), and its results are sent to them. Only the
first rank writes and prints. One process is the same code with nothing to send.

All messages about the run go through gloo, on the CPU, whose waiting threads sleep, without a time limit: a rank may
wait for as long as the candidates of a stage take. A dead rank closes its connections, which ends the others
(docs/decisions/0017).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import ToldElsewhere, UserError
from engine.training.rendezvous import fresh

T = TypeVar("T")

PATIENCE = timedelta(days=30)
"""How long a rank waits for another that is alive."""

STORE_PATIENCE = timedelta(minutes=2)
"""How long one question to the store may take; none waits for another rank."""

_LOST = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")
"""Words by which an error of a collective is known; its class is a plain RuntimeError where DDP raises it."""


class RankLost(RuntimeError):
    """Another rank ended, or cannot be reached."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        local: number of this process on its machine.
        store: keys and values all ranks see, held by the first one; None of one process.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: dist.Store | None = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this rank writes, prints and decides."""
        return self.rank == 0

    def first(self, work: Callable[[], T]) -> T | None:
        """What `work` gives, done by the first rank while the others wait; None on those.

        Raises:
            UserError: `work` raised one; the same on every rank.
        """
        if self.size == 1:
            return work()
        kept: list[T] = []
        self.agree(lambda: kept.append(work()))
        return kept[0] if kept else None

    def agree(self, work: Callable[[], T]) -> T:
        """What `work` gives (a JSON value) on every rank; only the first does it.

        Raises:
            UserError: `work` raised one; the same on every rank.
        """
        if self.size == 1:
            return work()
        message: dict[str, Any] = {}
        if self.is_first:
            try:
                message = {"value": work()}
            except UserError as error:
                message = {"error": str(error)}
        answer = json.loads(self.send(json.dumps(message).encode()))
        if "error" in answer:
            raise self._error(answer["error"])
        return answer["value"]

    def together(self, work: Callable[[], T]) -> T:
        """What `work` gives, done by every rank.

        Raises:
            UserError: it raised one on any rank; the lowest such rank's, on every rank.
        """
        if self.size == 1:
            return work()
        result: list[T] = []
        problem = b""
        try:
            result.append(work())
        except UserError as error:
            problem = str(error).encode() or b"unknown"
        problems = [p for p in self.gather(_to_tensor(problem)) if p.numel()]
        if problems:
            raise self._error(bytes(problems[0].numpy()).decode())
        return result[0]

    def _error(self, message: str) -> UserError:
        """What every rank raises when one failed: the first one reports it."""
        return UserError(message) if self.is_first else ToldElsewhere(message)

    def send(self, data: bytes) -> bytes:
        """The first rank's `data`, on every rank."""
        if self.size == 1:
            return data
        with contact():
            length = torch.tensor([len(data)])
            dist.broadcast(length, 0)
            buffer = _to_tensor(data) if self.is_first else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(buffer, 0)
        return bytes(buffer.numpy())

    def gather(self, data: Tensor) -> list[Tensor]:
        """Every rank's `data` (1-D, uint8, on the host, any length), in order of rank, on every rank."""
        if self.size == 1:
            return [data]
        with contact():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([data.numel()]))
            longest = max(1, max(map(int, lengths)))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: data.numel()] = data
            gathered = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(gathered, padded)
        return [block[: int(length)] for block, length in zip(gathered, lengths, strict=True)]

    def sum(self, values: Tensor) -> Tensor:
        """The sum of every rank's `values`, in place."""
        if self.size > 1:
            with contact():
                dist.all_reduce(values)
        return values

    def spread(self, model: nn.Module) -> None:
        """Gives every rank the first rank's parameters and buffers of `model`."""
        if self.size == 1:
            return
        with contact():
            for tensor in {t.data_ptr(): t for t in model.state_dict().values() if t.numel()}.values():
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                if whole.data_ptr() != tensor.data_ptr():
                    tensor.copy_(whole)

    @contextlib.contextmanager
    def data_parallel(self, module: nn.Module) -> Iterator[nn.Module]:
        """`module`, its gradients averaged over the ranks in every backward pass outside `accumulating`.

        Parts of a batch carry their share of it, so it is the sum that is wanted: differentiate `size` times the loss.
        Parameters start equal to the first rank's.
        """
        if self.size == 1:
            yield module
            return
        with contact():
            wrapped = nn.parallel.DistributedDataParallel(
                module, find_unused_parameters=True, gradient_as_bucket_view=True
            )
            yield wrapped


def _to_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def accumulating(module: nn.Module, more: bool) -> contextlib.AbstractContextManager[object]:
    """Inside it, gradients of `module` stay on this rank if `more` of the step is to come."""
    if more and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()


ALONE = Ranks()
"""One process."""


@contextlib.contextmanager
def join(*, cuda: bool) -> Iterator[Ranks]:
    """This process among those `torchrun` started, connected to them; `ALONE` if it was not started so.

    Args:
        cuda: models run on CUDA devices, one per rank.

    Raises:
        UserError: there are fewer CUDA devices than ranks on this machine.
        RankLost: the other ranks cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    ranks = Ranks(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", "0")))
    with contact():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own, which outlives the ranks
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = fresh(dist.TCPStore(host, port, is_master=False, timeout=STORE_PATIENCE), ranks.rank, size)
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=size, timeout=PATIENCE)
        else:
            dist.init_process_group(backend, timeout=PATIENCE)
    try:
        if cuda:
            ranks.together(lambda: _check_devices(ranks))
            torch.cuda.set_device(ranks.local)
        yield replace(ranks, store=_open_store(ranks))
    except RankLost:
        raise  # leaving in good order would wait for the rank that is gone
    except BaseException:
        if dist.is_initialized() and not cuda:
            dist.destroy_process_group()  # closes the connections, which tells the others
        raise
    else:
        dist.destroy_process_group()


def _open_store(ranks: Ranks) -> dist.Store:
    """A store of the run's own, at a free port of the first rank's machine."""
    host = os.environ["MASTER_ADDR"]
    with contact():
        if ranks.is_first:
            store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=STORE_PATIENCE)
            ranks.agree(lambda: store.port)
            return store
        return dist.TCPStore(host, ranks.agree(lambda: 0), is_master=False, timeout=STORE_PATIENCE)


def _check_devices(ranks: Ranks) -> None:
    if ranks.local >= torch.cuda.device_count():
        started = os.environ.get("LOCAL_WORLD_SIZE", ranks.size)
        raise UserError(
            f"torchrun: {started} processes were started on a machine with {torch.cuda.device_count()} CUDA devices:"
            " start one per device, or use --device cpu"
        )


def _reason(error: RuntimeError) -> str:
    """The first sentence of a library's message, without the place in its source."""
    line = next(iter(str(error).splitlines()), "")
    return re.sub(r"^\[\S+:\d+\]\s*", "", line).split(". ")[0]


@contextlib.contextmanager
def contact() -> Iterator[None]:
    """Errors of collectives and of the store in the block become `RankLost`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or any(word in text for word in _LOST):
            raise RankLost(f"lost contact with another rank ({_reason(error)})") from error
        raise
