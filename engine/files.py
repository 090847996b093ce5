"""Files that are written whole or not at all.

Everything is written to a temporary name in the same folder, flushed to the device, and moved over the final name with
`os.replace`, which is atomic on one file system; a reader sees the old content or the new, never a part. Rejected:
temporary files under `/tmp`, because a move between file systems is a copy and can be cut short.

Where the disk refuses, an `OSError` with its number and the final name is raised, whatever the library that wrote made
of it: safetensors has an exception of its own, which names neither.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_LEFTOVER = re.compile(r"\..+\.(tmp(\.[^.]+)?|old)")

DISK_ERRORS = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space or raise the quota",
    errno.EFBIG: "raise the limit of file sizes",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "fix the rights of the folder",
    errno.EPERM: "fix the rights of the folder",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network file system",
    errno.EMFILE: "raise the limit of open files",
    errno.ENFILE: "raise the limit of open files",
}
"""Errors of a machine rather than of its user, and what to do about each."""


@contextlib.contextmanager
def write_atomic(path: str | os.PathLike[str], *, previous: Path | None = None) -> Iterator[Path]:
    """Context manager giving a temporary path that replaces `path` when the block ends without an exception.

    The temporary file lies beside `path`, keeps its suffix (libraries choose formats by it) and is removed if the
    block raises. Missing parent folders are created.

    Args:
        path: the final name.
        previous: where the file it replaces goes. A kill between the two renames leaves only that one.

    Raises:
        OSError: the folder cannot be written; the error has the final name.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _naming(target):
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=f".tmp{target.suffix}", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(target):
            yield temporary
            _fsync(temporary)
            temporary.chmod(_default_mode())
            if previous is not None and target.exists():
                os.replace(target, previous)
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with _naming(target):
        _fsync(target.parent)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` as UTF-8 to `path`, whole or not at all."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` as indented JSON (no NaN or infinity: `ValueError`) to `path`, whole or not at all."""
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager giving an empty temporary folder that becomes `path` when the block ends without an exception.

    Everything in it has the rights that the process's mask (umask) gives new files and folders.

    An existing folder at `path` is replaced: it is moved aside first and removed after the new one is in place, so a
    kill in between leaves either the old folder, or the new one, or for one rename's time neither, never a mixture.

    Raises:
        OSError: the parent folder cannot be written, or `path` is a file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file, not a folder")
    with _naming(target):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with _naming(target):
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _fsync(Path(folder) / name)
                    (Path(folder) / name).chmod(_default_mode())  # safetensors gives 0600
            temporary.chmod(_default_mode(0o777))
            _replace_directory(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with _naming(target):
        _fsync(target.parent)


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def copy_atomic(source: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Copies the bytes of the file `source` to `path`, whole or not at all."""
    with write_atomic(path) as temporary:
        shutil.copyfile(source, temporary)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a killed writer left: nobody's result."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Removes what killed writers left under temporary names in `folder` and below; returns how many there were.

    Nobody else may be writing there.
    """
    found = [p for p in Path(folder).rglob(".*") if _LEFTOVER.fullmatch(p.name)]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(found)


@contextlib.contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turns what a refusing disk raises in the block into an `OSError` that names `target`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    except Exception as error:
        found = _OS_ERROR.search(str(error))
        if found is None or int(found[1]) not in DISK_ERRORS:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(target)) from error


def _replace_directory(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    os.replace(target, old)  # an empty folder may be replaced by a folder
    try:
        os.replace(temporary, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def _default_mode(asked: int = 0o666) -> int:
    """Permission bits that a plain `open` (of a folder, with 0o777, `mkdir`) gives; `mkstemp` gives 0600."""
    return asked & ~_umask()


def _umask() -> int:
    """The process's mask, read where the system tells it: setting it to learn it lends other threads the wrong one."""
    with contextlib.suppress(OSError, ValueError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
