"""Which backend serves a call: an order per device, a forced choice, and one clear line on every fallback.

    FFNAS_BACKEND=reference python ...          for a process
    with kernels.use_backend("reference"): ...  for a block (wins over the variable)

A forced backend goes to the front of the device's order; where it cannot serve a call, the next one does, and a warning
says so once per backend and reason. `use_backend(name, strict=True)` raises instead.

Rejected: choosing at import. It touches devices, builds extensions nobody asked for, and cannot name the call it
fails on.
"""

from __future__ import annotations

import importlib
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import TYPE_CHECKING

from kernels.call import Backend, BackendUnavailable, TensorOps

if TYPE_CHECKING:
    from torch import Tensor

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""All names; a backend's number (`number`) is its position here."""

ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}
"""Backends tried per device type; any other device has `reference` alone. `cuda` serves where it is asked for by name:
its kernels were never measured on a device, and building them takes nvcc minutes (docs/gpu.md)."""

ENVIRONMENT = "FFNAS_BACKEND"

_forced: ContextVar[tuple[str, bool] | None] = ContextVar("ffnas_backend", default=None)
_loaded: dict[str, Backend | str] = {}
_warned: set[tuple[str, str]] = set()
_lock = Lock()


class BackendFallbackWarning(UserWarning):
    """A backend could not serve a call and another one did."""


class BackendError(RuntimeError):
    """A backend demanded with `strict=True` cannot serve a call."""


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Puts backend `name` first for calls made in this block (this thread, and tasks started from it).

    The backward pass of a call runs on the backend of its forward pass, wherever it is run. A graph compiled by
    `torch.compile` keeps the backend it was traced with.

    Args:
        name: one of `BACKENDS`.
        strict: raise `BackendError` where the backend cannot serve a call, instead of falling back.

    Raises:
        ValueError: no backend of that name.
    """
    token = _forced.set((_check_name(name, "use_backend"), strict))
    try:
        yield
    finally:
        _forced.reset(token)


def select(
    device_type: str, refuses: Callable[[Backend], str | None], what: str = "this call", choice: int | None = None
) -> Backend:
    """The first backend of the order that can be loaded and does not refuse.

    Args:
        device_type: of the call's tensors.
        refuses: asks a backend: None where it can serve the call, else one line saying why not.
        what: the call, in words, for the error.
        choice: what `choice_number` returned when the call was traced; None for a call made now.

    Raises:
        BackendError: a strictly demanded backend cannot serve the call.
        ValueError: FFNAS_BACKEND names no backend.
    """
    forced, strict = _choice() if choice is None else ((*BACKENDS, None)[choice - 1], False)
    order: tuple[str, ...] = ORDER.get(device_type, ("reference",))
    if forced is not None:
        order = (forced, *(n for n in order if n != forced))
    for name in order:
        backend = load_backend(name)
        reason = backend if isinstance(backend, str) else refuses(backend)
        if not isinstance(backend, str) and reason is None:
            return backend
        if strict and name == forced:
            raise BackendError(f"backend {name!r} cannot serve {what}: {reason}")
        _warn_once(name, str(reason))
    raise AssertionError("the reference backend serves every call")


def tensor_ops(tensors: Sequence[Tensor], what: str) -> TensorOps:
    """The losses, attention and linear layers that serve a call with these tensors, chosen by `select`."""
    chosen = select(tensors[0].device.type, lambda backend: _refuses_tensors(backend, tensors), what).tensor_ops
    assert chosen is not None
    return chosen


def has_kernels(*tensors: Tensor) -> bool:
    """Whether a backend other than the reference can be loaded that serves these tensors, whatever is forced."""
    names = [name for name in ORDER.get(tensors[0].device.type, ()) if name != "reference"]
    loaded = [backend for backend in map(load_backend, names) if not isinstance(backend, str)]
    return any(_refuses_tensors(backend, tensors) is None for backend in loaded)


def _refuses_tensors(backend: Backend, tensors: Sequence[Tensor]) -> str | None:
    ops = backend.tensor_ops
    return "it has no losses and no attention" if ops is None else ops.supports(tensors)


def load_backend(name: str) -> Backend | str:
    """The backend, loaded once per process, or the reason (one line) why it cannot be."""
    known = _loaded.get(name)
    if known is not None:
        return known
    with _lock:
        if name not in _loaded:
            _loaded[name] = _load(name)
        return _loaded[name]


def retire(name: str, reason: str) -> None:
    """Takes a backend out of service for the rest of the process: calls go to the next one, which is said once.

    Between a forward pass and its backward pass the backend may not be retired. The reference stays.
    """
    if _check_name(name, "retire") == "reference":
        raise ValueError("retire: the reference backend serves what no other does")
    with _lock:
        _loaded[name] = reason


def number(backend: Backend) -> int:
    """The backend's position in `BACKENDS`."""
    return BACKENDS.index(backend.name)


def by_number(index: int) -> Backend:
    """The loaded backend of that number, for the backward pass of a call that ran on it."""
    backend = load_backend(BACKENDS[index])
    if isinstance(backend, str):
        raise BackendError(f"backend {BACKENDS[index]!r} ran forward but cannot run backward: {backend}")
    return backend


def available_backends() -> dict[str, str | None]:
    """Every backend with None where it can be loaded on this machine, else the reason why not."""
    loaded = {name: load_backend(name) for name in BACKENDS}
    return {name: backend if isinstance(backend, str) else None for name, backend in loaded.items()}


def preferred_backend(device_type: str) -> str:
    """Name of the backend that is asked first for tensors of `device_type` and can be loaded on this machine."""
    forced, _ = _choice()
    order = (*(() if forced is None else (forced,)), *ORDER.get(device_type, ("reference",)))
    return next(name for name in order if not isinstance(load_backend(name), str))


def fingerprint() -> int:
    """31 bits that differ where other backends would serve calls, or save other tensors (their `saved_layout`)."""
    backends = {name: load_backend(name) for name in (*ORDER["cpu"], *_loaded)}
    layouts = [(n, None if isinstance(b, str) else b.saved_layout) for n, b in sorted(backends.items())]
    return zlib.crc32(repr((_choice(), layouts)).encode()) & 0x7FFFFFFF


def choice_number() -> int:
    """The backend forced at this moment, by `use_backend` or the environment: its number + 1, or 0."""
    forced, _ = _choice()
    return 0 if forced is None else BACKENDS.index(forced) + 1


def _load(name: str) -> Backend | str:
    module = f"kernels.backends.{name}"
    try:
        return importlib.import_module(module).load()
    except BackendUnavailable as error:
        return str(error)
    except ModuleNotFoundError as error:
        if error.name == module:
            return "this version of ffnas does not have it"
        return f"module {error.name!r} is not installed"


def _choice() -> tuple[str | None, bool]:
    forced = _forced.get()
    if forced is not None:
        return forced
    name = os.environ.get(ENVIRONMENT)
    return (_check_name(name, ENVIRONMENT), False) if name else (None, False)


def _check_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}, use one of {', '.join(BACKENDS)}")
    return name


def _warn_once(name: str, reason: str) -> None:
    if (name, reason) in _warned:
        return
    _warned.add((name, reason))
    warnings.warn(f"ffnas backend {name!r} not used: {reason}", BackendFallbackWarning, stacklevel=2)
