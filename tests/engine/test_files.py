"""Atomic writing: the old content or the new, never a part, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest

from engine import files
from engine.files import atomic_directory, file_hash, write_atomic, write_json_atomic, write_text_atomic


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_text_and_json(tmp_path):
    write_text_atomic(tmp_path / "a" / "b.txt", "grüße\n")
    assert (tmp_path / "a" / "b.txt").read_bytes() == "grüße\n".encode()
    write_json_atomic(tmp_path / "c.json", {"é": [1, 2.5, None]})
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}
    assert names(tmp_path) == ["a", "c.json"]


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.json"
    write_text_atomic(path, "old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_atomic(path, {"x": math.nan})
    with pytest.raises(RuntimeError, match="stop"), write_atomic(path) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise RuntimeError("stop")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["c.json"]


def test_temporary_file_lies_beside_the_target_and_keeps_its_suffix(tmp_path):
    with write_atomic(tmp_path / "model.safetensors") as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".safetensors"
        assert not (tmp_path / "model.safetensors").exists()
    assert names(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_a_plain_file(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_atomic(tmp_path / "ours", "")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "sub" / "a").read_text() == "1"
    assert names(tmp_path) == ["model"]


def test_directory_is_replaced_not_merged(tmp_path):
    for name in ("old", "new"):
        with atomic_directory(tmp_path / "model") as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path / "model") == ["new"]
    assert names(tmp_path) == ["model"]


def test_a_failing_directory_leaves_the_old_one(tmp_path):
    with atomic_directory(tmp_path / "model") as temporary:
        (temporary / "old").write_text("")
    with pytest.raises(KeyboardInterrupt), atomic_directory(tmp_path / "model") as temporary:  # noqa: PT012
        (temporary / "new").write_text("")
        raise KeyboardInterrupt
    assert names(tmp_path / "model") == ["old"]
    assert names(tmp_path) == ["model"]


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "state.json"
    write_text_atomic(path, "old")
    code = (
        "import os, signal, sys\nfrom engine.files import write_atomic\n"
        "with write_atomic(sys.argv[1]) as t:\n    t.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode != 0
    assert path.read_text() == "old"


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 1])
def test_hash(tmp_path, size):
    path = tmp_path / "f"
    path.write_bytes(b"x" * size)
    assert file_hash(path) == hashlib.sha256(b"x" * size).hexdigest()


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_everything_follows_the_mask(tmp_path, mask):
    """Files that a library writes with rights of its own (safetensors: 0600), and folders, as `open` and `mkdir` would
    make them."""
    import torch
    from safetensors.torch import save_file

    with write_atomic(tmp_path / "file") as temporary:
        temporary.write_text("1")
    with atomic_directory(tmp_path / "folder") as temporary:
        save_file({"a": torch.zeros(2)}, temporary / "model.safetensors")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        (temporary / "sub" / "a").chmod(0o600)
    found = {p.relative_to(tmp_path): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    assert len(found) == 5
    for path, mode in found.items():
        assert mode == (0o777 if (tmp_path / path).is_dir() else 0o666) & ~mask, path


def test_the_mask_is_found_without_the_system_telling(monkeypatch, mask):
    assert files._umask() == mask

    def nowhere(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", nowhere)
    assert files._umask() == mask
