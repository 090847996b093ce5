"""Damage of what a run writes: checksums notice it, the second copy is used, one line says so."""

import errno
import random
import resource
import sqlite3
from contextlib import ExitStack, closing
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import engine.files
from engine.architecture.architecture import uniform
from engine.errors import UserError
from engine.files import atomic_directory, remove_leftovers, write_text_atomic
from engine.training.checkpoint import (
    Damaged,
    has_training_state,
    load_training_state,
    load_weights,
    previous_state,
    remove_training_state,
    save_training_state,
    save_weights,
    second_copy,
)
from engine.training.optim import build_optimizer, linear_schedule
from kernels.language.expression import GELU_FFN
from search.ledger.copy import copy_path, open_ledger
from search.ledger.ledger import Trial


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def model_of(value):
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def values(model):
    return {p.mean().item() for p in model.parameters()}


def damages(size, count=12):
    """Truncations and single flipped bits, spread over a file of `size` bytes."""
    rng = random.Random(0)
    cuts = [("cut", at) for at in (0, 1, size // 2, size - 1)]
    return cuts + [("flip", rng.randrange(size)) for _ in range(count)]


def damage(path, kind, at):
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:at])
    else:
        flip(path, at)


def test_any_damage_of_weights_is_noticed_and_their_copy_used(tmp_path, caplog):
    path = tmp_path / "w.safetensors"
    save_weights(path, model_of(2.0))
    sound = path.read_bytes()
    for kind, at in damages(len(sound)):
        damage(path, kind, at)
        caplog.clear()
        model = model_of(0.0)
        load_weights(path, model)
        assert values(model) == {2.0}, (kind, at)
        assert len(caplog.messages) == 1, (kind, at)
        assert "its copy is used" in caplog.messages[0]
        assert path.read_bytes() == sound  # made again from the copy
    path.unlink()
    load_weights(path, model)
    assert path.read_bytes() == sound


def test_weights_damaged_twice_are_refused_and_the_model_left_alone(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(path, model_of(2.0))
    for file in (path, second_copy(path)):
        flip(file, len(file.read_bytes()) - 3)
    model = model_of(0.0)
    with pytest.raises(Damaged, match="checksum is wrong"):
        load_weights(path, model)
    assert values(model) == {0.0}


def training(value):
    model = model_of(value)
    optimizer = build_optimizer(model, lr=0.1)
    return model, optimizer, linear_schedule(optimizer, 1, 10)


def test_any_damage_of_a_training_state_is_noticed_and_the_one_before_used(tmp_path, caplog):
    path = tmp_path / "phase.pt"
    for step in (3, 4):
        save_training_state(path, *training(float(step)), step, {"best": torch.tensor(step)})
    sound = path.read_bytes()
    for kind, at in damages(len(sound)):
        damage(path, kind, at)
        caplog.clear()
        parts = training(0.0)
        assert load_training_state(path, *parts) == (3, {"best": torch.tensor(3)}), (kind, at)
        assert values(parts[0]) == {3.0}
        assert [m.rpartition(": ")[2] for m in caplog.messages] == ["the one before it is used"]
        path.write_bytes(sound)
    path.unlink()  # killed between the two renames
    assert has_training_state(path)
    assert load_training_state(path, *training(0.0))[0] == 3
    flip(previous_state(path), 100)
    parts = training(0.0)
    assert load_training_state(path, *parts) == (0, {})
    assert values(parts[0]) == {0.0}
    remove_training_state(path)
    assert not has_training_state(path)


def trial(number, stage="stage1"):
    architecture = uniform(GELU_FFN, 1, Fraction(1, 2), 2)
    return Trial(stage, number, architecture, f"k{number}", 0.125 + number, 100, 1.5)


def opened(path):
    notes = []
    with ExitStack() as stack:
        ledger = open_ledger(path, stack, notes.append)
        return ledger.trials("stage1"), notes


def write_trials(path, count):
    with ExitStack() as stack:
        ledger = open_ledger(path, stack, print)
        for number in range(len(ledger.trials("stage1")), count):
            ledger.record(trial(number))


@pytest.mark.parametrize("harm", ["garbage", "truncated", "emptied", "removed", "changed digit"])
def test_a_damaged_ledger_is_replaced_by_its_copy(tmp_path, harm):
    path = tmp_path / "study.db"
    write_trials(path, 4)
    content = path.read_bytes()
    if harm == "removed":
        path.unlink()
    elif harm == "changed digit":  # a sound database with another score
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE trial_values SET value = 99.0 WHERE trial_value_id = 2")
    else:
        path.write_bytes({"garbage": b"x" * 9000, "truncated": content[: len(content) // 2], "emptied": b""}[harm])
    trials, notes = opened(path)
    assert trials == [trial(n) for n in range(4)]
    assert len(notes) == 1
    assert "its copy with 4 trials is used" in notes[0]
    assert opened(path) == (trials, [])
    assert path.with_name("study.db.damaged").exists() == (harm != "removed")


def test_without_a_sound_copy_a_damaged_ledger_ends_in_one_line(tmp_path):
    path = tmp_path / "study.db"
    write_trials(path, 2)
    for file in (path, copy_path(path)):
        file.write_bytes(b"x" * 9000)
    with pytest.raises(UserError, match="is damaged"):
        opened(path)


def refuse(monkeypatch, number):
    def fsync(_handle):
        raise OSError(number, "refused")

    monkeypatch.setattr(engine.files.os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_refusing_disk_is_named_with_the_final_file_and_leaves_the_old_one(tmp_path, monkeypatch, number):
    path = tmp_path / "a.json"
    write_text_atomic(path, "old")
    refuse(monkeypatch, number)
    for write in (lambda: write_text_atomic(path, "new"), lambda: save_weights(path, model_of(1.0))):
        with pytest.raises(OSError) as caught:
            write()
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
    with pytest.raises(OSError) as caught, atomic_directory(tmp_path / "model") as folder:
        (folder / "weights").write_text("x")
    assert caught.value.filename == str(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


@pytest.fixture
def small_files():
    """Files end at 20,000 bytes: what is behind them is a full disk (errno EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_libraries_that_hide_a_full_disk_are_seen_through(tmp_path, small_files):
    """What safetensors and torch raise names neither the reason nor the file."""
    model = nn.Linear(100, 100)
    optimizer = build_optimizer(model, lr=0.1)
    for name, write in {
        "w.safetensors": lambda path: save_weights(path, model),
        "c.pt": lambda path: save_training_state(path, model, optimizer, linear_schedule(optimizer, 1, 2), 1, {}),
    }.items():
        with pytest.raises(OSError) as caught:
            write(tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "stage1").mkdir()
    kept = [".lock", ".study.db.copy", "a.tmp", "stage1/.supernet.safetensors.copy"]
    gone = [".a.x1y2.tmp.json", ".model.abcd.tmp/weights", "stage1/.w.q.tmp.safetensors", ".model.zz.old/weights"]
    for name in (*kept, *gone):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    assert remove_leftovers(tmp_path) == 4
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == set(kept)


def test_weights_of_every_dtype_have_a_checksum(tmp_path):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8):
                self.register_buffer(str(dtype).replace(".", "_"), torch.ones(3).to(dtype))
            self.register_buffer("scalar", torch.tensor(3.0))
            self.register_buffer("empty", torch.zeros(0, 4))

    save_weights(tmp_path / "m.safetensors", Mixed())
    other = Mixed()
    other.scalar.zero_()
    load_weights(tmp_path / "m.safetensors", other)
    assert np.isclose(other.scalar.item(), 3.0)
