"""Worker processes that tokenize and pack blocks of documents for `engine.data.prepare`.

Chosen: processes started afresh, each with its own tokenizer, word table and one thread. Rejected: the tokenizer's own
threads in one process; packing and the word table are Python, and would run on one core.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from engine.data.text import Packer, split_sentences
from engine.model_sources import TeacherSource, load_tokenizer


@contextlib.contextmanager
def packers(
    source: TeacherSource, tokenizer: Any, max_length: int, workers: int, *, published: bool = False
) -> Iterator[Callable[[list[str]], Future]]:
    """A function that packs documents elsewhere, or here at once where there is one worker.

    Its future gives int32 [T] tokens, int64 [N] tokens of each sequence, and the processor seconds they took.
    """
    if workers == 1:
        packer = Packer(tokenizer, max_length)

        def at_once(documents: list[str]) -> Future:
            future: Future = Future()
            future.set_result(_timed(packer, documents))
            return future

        yield at_once
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (source, max_length, published)) as pool:
        yield lambda documents: pool.submit(_pack, documents)


_packer: Packer | None = None


def _start_worker(source: TeacherSource, max_length: int, published: bool) -> None:
    """In a new worker: its tokenizer, one thread, and an end when its parent ends."""
    global _packer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _packer = Packer(load_tokenizer(source, published=published), max_length)


def _pack(documents: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    assert _packer is not None
    return _timed(_packer, documents)


def _timed(packer: Packer, documents: list[str]) -> tuple[np.ndarray, np.ndarray, float]:
    began = time.process_time()
    tokens, lengths = packer([split_sentences(document) for document in documents])
    return tokens, lengths, time.process_time() - began
