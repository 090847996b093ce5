"""Beside other busy processes: a call goes on alone where its threads get less done than one, with the same bits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from ctypes import c_int64

import pytest
import torch

from kernels import FusedFFNStack
from kernels.dispatch import load_backend

CPU = load_backend("cpu")
pytestmark = pytest.mark.skipif(isinstance(CPU, str), reason=f"no CPU kernels: {CPU}")

MS = 10**6


def note(now, took, spent) -> bool:
    """What a thread that shares out work notes after a region (ns), and whether its next region runs on it alone."""
    return bool(CPU._library.ffnas_note_region(c_int64(now), c_int64(took), c_int64(spent)))


def in_a_new_thread(work):
    """A thread that has noted nothing yet."""
    found = []

    def run():
        try:
            found.append(work())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def test_threads_that_get_more_done_than_one_stay():
    def work():
        return [note(k * 30 * MS, 30 * MS, spent * MS) for k, spent in enumerate((60, 50, 40, 29, 90))]

    assert in_a_new_thread(work) == [False] * 5


def test_a_crowded_thread_goes_alone_looks_again_and_waits_longer_each_time():
    def work():
        seen, now = [], 0
        for milliseconds, took, spent in [
            (30, 30, 20),  # two thirds of a core: alone
            (30, 30, 29),
            (200, 30, 29),
            (30, 30, 29),  # a quarter of a second is over: shares again
            (30, 30, 15),  # still crowded
            (300, 30, 29),  # half a second is not over
            (250, 30, 29),
            (30, 30, 55),  # the others are gone
            (30, 30, 20),  # and are back: the pause is a short one again
            (260, 30, 29),
        ]:
            now += milliseconds * MS
            seen.append(note(now, took * MS, spent * MS))
        return seen

    assert in_a_new_thread(work) == [True, True, True, False, True, True, False, False, True, False]


def test_where_one_thread_is_slower_still_the_work_is_shared():
    def work():
        return [
            note(now * MS, 30 * MS, spent * MS) for now, spent in ((30, 24), (60, 9), (90, 24), (200, 24), (600, 24))
        ]

    assert in_a_new_thread(work) == [True, False, False, False, True]


def test_short_regions_are_judged_together_and_do_not_keep_a_thread_alone():
    def work():
        first = [note(k * MS, 2 * MS, MS) for k in range(10)]
        return first[:9], first[9], note(100 * MS, 1000, -1), note(300 * MS, 1000, -1)

    assert in_a_new_thread(work) == ([False] * 9, True, True, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_are_the_same(dtype, threads):
    torch.manual_seed(0)
    stack = FusedFFNStack(2, 37, 23, "linear(relu(mul(linear(x,wb1),x)),wb2)").to(dtype)
    x = torch.randn(700, 37).to(dtype).requires_grad_()
    weight = torch.randn(700, 37).to(dtype)

    def step():
        out = stack(x)
        return out, *torch.autograd.grad(out, [x, *stack.parameters()], weight)

    def work():
        torch.set_num_threads(threads)
        shared = step()
        assert note(time.monotonic_ns(), 1000 * MS, MS)
        alone = step()
        assert note(time.monotonic_ns(), 0, -1)
        return all(map(torch.equal, shared, alone))

    before = torch.get_num_threads()
    try:
        assert in_a_new_thread(work)
    finally:
        torch.set_num_threads(before)


SAID = """
import time, warnings, torch
from kernels import FusedFFN
from kernels.dispatch import load_backend
cpu = load_backend("cpu")
torch.set_num_threads(2)
ffn, x = FusedFFN(16, 16), torch.randn(300, 16)
with warnings.catch_warnings(record=True) as caught, torch.no_grad():
    warnings.simplefilter("always")
    ffn(x)
    assert not caught
    cpu._library.ffnas_note_region.argtypes = [__import__("ctypes").c_int64] * 3
    cpu._library.ffnas_note_region(time.monotonic_ns(), 10**9, 10**6)
    for _ in range(3):
        ffn(x)
(only,) = caught
assert "--threads 1" in str(only.message), only.message
"""


def test_it_is_said_once_with_what_helps():
    result = subprocess.run([sys.executable, "-c", SAID], capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
