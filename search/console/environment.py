"""What an installation must have before a command starts, checked without importing any of it.

Rejected: leaving it to the first import that fails. An old PyTorch fails hours in, at the first function it lacks, and
another package named `kernels` with a missing module nobody has heard of.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import re
import shutil
from collections.abc import MutableMapping
from importlib import metadata
from pathlib import Path

from engine.errors import UserError

OLDEST = {"torch": (2, 11), "transformers": (5, 17)}
"""Lowest versions that work."""


def check_versions() -> None:
    """Raises `UserError` naming the first package that is missing or too old, and the line that mends it."""
    for name, oldest in OLDEST.items():
        needed = ".".join(map(str, oldest))
        remedy = f'run `pip install -U "{name}>={needed}"`'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError as error:
            raise UserError(f"{name} is not installed: {remedy}") from error
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < oldest:
            raise UserError(f"{name} {version} is too old, ffnas needs {needed} or later: {remedy}")


def check_names() -> None:
    """Raises `UserError` where another package named `kernels` is imported instead of ours."""
    spec = importlib.util.find_spec("kernels")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    if not any((place / "language/expression.py").is_file() for place in places):
        found = "Hugging Face's package `kernels`" if places else "no package `kernels`"
        raise UserError(
            f"{found} is found where ffnas's own should be: run `pip uninstall kernels`, then `pip install -e .` in"
            " ffnas's folder, or give ffnas an environment of its own"
        )


def give_home(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Lets a user without a home directory or an entry among the users (a container's number) run all the same.

    Libraries ask for both when they are imported, to name their caches. Call before the first of them is.

    Returns:
        A line saying where caches go, where that had to be decided.
    """
    if not any(environment.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            environment["USER"] = f"user{os.getuid()}"
    home = os.path.expanduser("~")
    if os.path.isdir(home):
        return None
    from kernels.cache import temporary_home  # not above: `check_names` says whose `kernels` that is

    place = temporary_home()
    environment["HOME"] = str(place)
    return f"no home directory: caches go to {place} (set HOME or FFNAS_CACHE for another place)"


def unused_gpu() -> str | None:
    """A line for a machine with an NVIDIA driver whose PyTorch is built without CUDA; None elsewhere."""
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is not None or not driver:
        return None
    return (
        f"this machine has an NVIDIA driver, but PyTorch {torch.__version__} is built without CUDA, so the CPU is"
        ' used: install a CUDA build (pytorch.org, "Get started"), or say --device cpu'
    )


def processor() -> str:
    """The processor's name, as it calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (" ".join(line.partition(":")[2].split()) for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
