"""Faults that a child of `fault_runs.Nursery` is given before its search begins: each function breaks one thing."""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
import signal
import time
from pathlib import Path

import torch


def full_disk_at(count: str) -> None:
    """Every write of a file from the `count`-th on (counted from 0) is refused for lack of space."""
    import engine.files

    number, replace = itertools.count(), os.fsync

    def fsync(handle: int) -> None:
        if next(number) >= int(count):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(handle)

    engine.files.os.fsync = fsync


def mask(octal: str) -> None:
    """The process's umask."""
    os.umask(int(octal, 8))


def killed_after_removing(count: str) -> None:
    """The `count`-th file that goes once summary.json is there is the last thing this process does."""
    number, unlink = itertools.count(1), Path.unlink

    def counted(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if any((folder / "summary.json").exists() for folder in path.parents) and next(number) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    Path.unlink = counted


def jumping_clock() -> None:
    """Wall-clock time jumps by up to a day at every look, mostly backwards."""
    rng, real = random.Random(0), time.time
    time.time = lambda: real() + rng.uniform(-86400, 3600)


def out_of_memory_in(where: str) -> None:
    """The n-th call of a step, `module/attribute@n`, finds no memory; those after it do. Says so on standard output."""
    import importlib

    where, _, which = where.partition("@")
    module_name, _, path = where.partition("/")
    owner = importlib.import_module(module_name)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    inner, number = getattr(owner, name), itertools.count(1)

    def failing(*args: object, **kwargs: object) -> object:
        if next(number) == int(which):
            print(f"fault: no memory for {where}", flush=True)
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return inner(*args, **kwargs)

    setattr(owner, name, failing)


def nan_in_loss(phase: str) -> None:
    """The loss of a phase is NaN at its second step."""
    import search.phases

    run_phase = search.phases.run_phase

    def poisoned(name: str, model: object, batches: object, loss: object, *args: object, **kwargs: object) -> int:
        def bad(batch: object, step: int) -> object:
            terms = loss(batch, step)
            if name == phase and step == 1:
                terms = type(terms)(terms.total * math.nan, terms.hidden, terms.attention, terms.prediction)
            return terms

        return run_phase(name, model, batches, bad, *args, **kwargs)

    search.phases.run_phase = poisoned


def infinite_gradient(phase: str) -> None:
    """One gradient of a phase overflows at its second step; the loss stays finite."""
    import search.phases

    run_phase = search.phases.run_phase

    def poisoned(name: str, model: torch.nn.Module, batches: object, loss: object, *args: object, **kw: object) -> int:
        steps = itertools.count()

        def hook(grad: torch.Tensor) -> torch.Tensor:
            return grad * math.inf if name == phase and next(steps) == 1 else grad

        handle = next(p for p in model.parameters() if p.requires_grad).register_hook(hook)
        try:
            return run_phase(name, model, batches, loss, *args, **kw)
        finally:
            handle.remove()

    search.phases.run_phase = poisoned


def nan_teacher() -> None:
    """The teacher answers NaN."""
    from engine.teacher.adapter import Teacher

    states = Teacher.states

    def poisoned(self: Teacher, *args: object, **kwargs: object) -> object:
        answer = states(self, *args, **kwargs)
        answer.embeddings.fill_(math.nan)
        return answer

    Teacher.states = poisoned


def wrong_kernel() -> None:
    """The C++ kernels of FFNs give results that are off by a hundredth."""
    from kernels.backends.cpu import CpuBackend

    forward = CpuBackend.forward

    def wrong(self: CpuBackend, call: object, save: bool) -> object:
        out, saved = forward(self, call, save)
        return out.mul_(1.01), saved

    CpuBackend.forward = wrong


def full_disk_real(folder: str) -> None:
    """Fills what is left of a small file system, so that the search finds a full disk."""
    block = b"x" * 4096
    with open(Path(folder) / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


def wrong_gradient() -> None:
    """The C++ kernels of FFNs give a gradient of w1 that is off by a tenth; forward passes are right."""
    from kernels.backends.cpu import CpuBackend

    backward = CpuBackend.backward

    def wrong(self: CpuBackend, *args: object, **options: object) -> object:
        gradients = backward(self, *args, **options)
        for gradient in gradients:
            gradient.mul_(1.1)
        return gradients

    CpuBackend.backward = wrong


def impatient_ledger() -> None:
    """A locked ledger is waited for a twentieth of a second only."""
    import search.ledger.copy
    import search.ledger.ledger

    search.ledger.ledger.Ledger.__init__.__kwdefaults__["timeout"] = 0.05
    search.ledger.copy.problem_of.__kwdefaults__["timeout"] = 0.05
    time.sleep = lambda _: None  # Optuna waits between its retries


def reference_only() -> None:
    """Only plain PyTorch serves."""
    from kernels.dispatch import retire

    retire("cpu", "a test wants the reference")
