"""Whether matrices still hold what was packed, without missing a write.

Two sums over every byte (csrc/cpu/fingerprint.h) tell for certain, at the speed of memory. Matrices that were met
unchanged twice are then watched by the system, page by page, where that can be (csrc/cpu/write_watch.h): while no page
was written to, only what lies outside whole pages is read. Anything else, and every doubt, reads all bytes again.

Rejected: version counters, which `.data` and NumPy do not move; and reading a part of the bytes at each call, in turns,
which answers from old weights until their turn comes.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Sequence
from threading import Lock

PAGE = mmap.PAGESIZE
_WATCHED_FROM = 2
"""Calls without a change before the system watches: weights in training are written all the time, page after page."""


class Unchanged:
    """The state of some memory when this was made.

    Args:
        library: csrc/cpu, with its calls' types set.
        isa: instruction set for the sums.
        matrices: address and bytes of each.
    """

    def __init__(self, library: ctypes.CDLL, isa: int, matrices: Sequence[tuple[int, int]]) -> None:
        self._library, self._isa = library, isa
        self._whole = array("q")
        self._pages, self._edges = array("q"), array("q")
        for begin, count in matrices:
            self._add(self._whole, begin, begin + count)
            first, last = -(-begin // PAGE) * PAGE, (begin + count) // PAGE * PAGE
            if first >= last:
                self._add(self._edges, begin, begin + count)
                continue
            self._pages.extend((first, last - first))
            self._add(self._edges, begin, first)
            self._add(self._edges, last, begin + count)
        self._sums = self._sums_of(self._whole)
        self._edge_sums = array("Q")
        self._watch: int | None = None
        self._armed, self._met, self._refused = False, 0, not self._pages
        self._lock = Lock()

    @property
    def watched(self) -> bool:
        """Whether the system watches."""
        return self._armed

    def __call__(self, watch: bool = True) -> bool:
        """Whether nothing changed; `watch`: whether the system may be asked (not where devices write to memory).

        One thread at a time: who has the system forget a write still has to look at the bytes.
        """
        with self._lock:
            return self._unchanged(watch)

    def _unchanged(self, watch: bool) -> bool:
        clean = watch and self._armed and bool(self._library.ffnas_watch_clean(self._watch))
        if clean and self._sums_of(self._edges) == self._edge_sums:
            return True
        self._met += 1
        self._armed = watch and self._met >= _WATCHED_FROM and self._arm()
        self._edge_sums = self._sums_of(self._edges) if self._armed else array("Q")
        same = self._sums_of(self._whole) == self._sums
        self._armed = self._armed and same
        return same

    def _arm(self) -> bool:
        """Has the system watch from now on; the sums are computed after it, so no write lies between."""
        if self._watch is None and not self._refused:
            self._watch = self._library.ffnas_watch_new(self._pages.buffer_info()[0], len(self._pages) // 2)
            self._refused = self._watch is None
            return not self._refused
        return self._watch is not None and bool(self._library.ffnas_watch_arm(self._watch))

    @staticmethod
    def _add(words: array[int], begin: int, end: int) -> None:
        """Address, row stride, rows and row width in bytes, as one row."""
        if begin < end:
            words.extend((begin, end - begin, 1, end - begin))

    def _sums_of(self, words: array[int]) -> array[int]:
        count = len(words) // 4
        sums = array("Q", bytes(16 * count))
        if count:
            self._library.ffnas_fingerprints(self._isa, words.buffer_info()[0], count, sums.buffer_info()[0])
        return sums

    def __del__(self) -> None:
        if getattr(self, "_watch", None):
            self._library.ffnas_watch_free(self._watch)
