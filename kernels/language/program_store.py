"""Storage of lowered programs: many small tensors in few allocations.

Programs outlive the large outputs allocated between them. One heap block each would split the gap every freed output
leaves, so that the next output no longer fits: the process grew by one output (276 KB at 128 tokens) per new
expression. Here 64 programs share a block of memory, and their tensor objects are made together.

Rejected: freeing slots for reuse; a graph of autograd may hold a program longer than the cache of programs does.
"""

from __future__ import annotations

from threading import Lock

import torch
from torch.utils._python_dispatch import _disable_current_modes

BLOCK_PROGRAMS = 64
BLOCK_WORDS = BLOCK_PROGRAMS * 256

_lock = Lock()
_block: torch.Tensor | None = None
_slots: list[torch.Tensor] = []
_used = 0


def store(words: tuple[int, ...]) -> torch.Tensor:
    """An int32 CPU tensor of its own with these words: a real one, whatever mode the caller is traced or run in."""
    global _block, _slots, _used
    with _lock, torch.inference_mode(False), torch.no_grad(), _disable_current_modes(), torch.device("cpu"):
        values = torch.tensor(words, dtype=torch.int32)
        if len(words) > BLOCK_WORDS // 4:
            return values
        if _block is None or not _slots or _used + len(words) > BLOCK_WORDS:
            _block = torch.empty(BLOCK_WORDS, dtype=torch.int32)
            # .data: a version counter of its own, so that storing one program does not mark the others as changed
            _slots = [_block.as_strided((0,), (1,)).data for _ in range(BLOCK_PROGRAMS)]
            _used = 0
        slot = _slots.pop()
        slot.as_strided_((len(words),), (1,), _used)
        slot.copy_(values)
        _used += len(words)
        return slot
