"""`kernels.runtime.unchanged`: every byte counts, watched by the system or not."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import threading

import numpy as np
import pytest

from kernels.runtime import unchanged as module
from kernels.runtime.library import _isas, _library

PAGE = module.PAGE


def made(*arrays):
    library = _library()
    return module.Unchanged(library, _isas(library)["fp32"], [(a.ctypes.data, a.nbytes) for a in arrays])


def pages(count, offset=0):
    """Floats of so many pages, from `offset` bytes into one on."""
    whole = np.full(((count + 2) * PAGE) // 4, 3, np.float32)
    start = (-whole.ctypes.data % PAGE + offset) // 4
    return whole[start : start + count * PAGE // 4]


@pytest.fixture
def watched():
    """Matrices, and what is known of them; the system watches where it can."""
    matrices = [pages(5, 64), pages(3), np.ones(7, np.float32)]
    state = made(*matrices)
    for _ in range(4):
        assert state()
    if not state.watched:
        pytest.skip("this system does not watch memory for processes (Linux since 6.7, and allowed to)")
    return matrices, state


def test_all_bytes_are_looked_at(watched):
    """First and last of each matrix, around the ends of pages, one after the other, and undone again."""
    matrices, state = watched
    for matrix in matrices:
        for at in {0, 1, PAGE // 4 - 17, PAGE // 4 - 16, PAGE // 4, matrix.size // 2, matrix.size - 1}:
            if not 0 <= at < matrix.size:
                continue
            before = matrix[at]
            matrix[at] = before + 1
            assert not state()
            assert not state()
            matrix[at] = before
            for _ in range(3):
                assert state()
            assert state.watched


def test_watching_spares_reading(watched, monkeypatch):
    """While nothing is written, what lies in whole pages is not summed up again."""
    _, state = watched
    seen = []
    sums = module.Unchanged._sums_of
    monkeypatch.setattr(module.Unchanged, "_sums_of", lambda self, words: seen.append(words) or sums(self, words))
    assert state()
    assert len(seen) == 1
    assert seen[0] is state._edges
    assert state(watch=False)  # devices may write: the bytes decide
    assert len(seen) == 2
    assert seen[1] is state._whole


def test_pages_given_back_to_the_system_are_changed(watched):
    matrices, state = watched
    libc = ctypes.CDLL(None, use_errno=True)
    address = matrices[1].ctypes.data + PAGE
    assert libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 4) == 0  # MADV_DONTNEED: now zeros
    assert not state()


def test_a_forked_child_reads_the_bytes(watched):
    """Its pages are not watched, and the parent's marks say nothing about them."""
    matrices, state = watched
    fork = multiprocessing.get_context("fork")
    answers = fork.SimpleQueue()

    def child():
        answers.put(state())
        matrices[0][20] = 9
        answers.put(state())

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert answers.get()
    assert not answers.get()
    assert state()


def test_shared_memory_is_not_watched():
    """Another process may write to it unseen."""
    import mmap

    memory = np.frombuffer(mmap.mmap(-1, 4 * PAGE), np.float32)
    state = made(memory)
    for _ in range(4):
        assert state()
    assert not state.watched
    process = multiprocessing.get_context("fork").Process(target=lambda: memory.__setitem__(9, 1.0))
    process.start()
    process.join()
    assert not state()


def test_threads_do_not_take_a_write_for_seen_before_it_is(watched, monkeypatch):
    """One thread has noticed it and had the system watch anew; the other one asks before the bytes were read."""
    matrices, state = watched
    matrices[0][3] = 9
    inside, go, found = threading.Event(), threading.Event(), []
    sums = module.Unchanged._sums_of

    def slowly(self, words):
        if words is self._whole and not inside.is_set():
            inside.set()
            assert go.wait(60)
        return sums(self, words)

    monkeypatch.setattr(module.Unchanged, "_sums_of", slowly)
    threads = [threading.Thread(target=lambda: found.append(state())) for _ in range(2)]
    threads[0].start()
    assert inside.wait(60)
    threads[1].start()
    threads[1].join(0.3)
    go.set()
    for thread in threads:
        thread.join()
    assert found == [False, False]


def test_memory_that_somebody_else_watches_is_read(watched):
    matrices, state = watched
    other = made(*matrices)
    for _ in range(4):
        assert other()
    assert not other.watched
    matrices[0][1] = 9
    assert not other()
    assert not state()


def test_memory_of_a_file_is_not_watched(tmp_path):
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    memory = np.memmap(tmp_path / "file", np.float32, mode="c")
    state = made(memory)
    for _ in range(4):
        assert state()
    assert not state.watched
    with open(tmp_path / "file", "r+b") as file:
        file.write(b"\1")
        file.flush()
        os.fsync(file.fileno())
    assert not state()


def test_many_states_come_and_go():
    """Descriptors are closed."""
    matrix = pages(2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        state = made(matrix)
        for _ in range(3):
            assert state()
        del state
    assert len(os.listdir("/proc/self/fd")) <= before + 1
