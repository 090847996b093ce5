"""The teacher's answers for a fixed list of batches, computed once and kept.

Candidates trained on the same batches, one after the other, share one teacher pass per batch instead of paying one
each. (Candidates trained side by side share it anyway: `engine.distill.population`.)
"""

from __future__ import annotations

from engine.data import Batch
from engine.distill.distiller import Distiller
from engine.states import EncoderStates


def states_bytes(states: EncoderStates) -> int:
    """Bytes the tensors of `states` occupy."""
    tensors = [states.embeddings, *states.hidden, *states.queries, *states.keys]
    if states.logits is not None:
        tensors.append(states.logits)
    return sum(t.numel() * t.element_size() for t in tensors)


class TeacherTargets:
    """The teacher's answers for a fixed sequence of batches, computed on first use and kept while they fit.

    Args:
        distiller: whose teacher answers.
        need_logits: whether the prediction term will be used.
        limit_bytes: answers beyond this many bytes are not kept but computed again each time.
    """

    def __init__(self, distiller: Distiller, *, need_logits: bool, limit_bytes: int = 2 << 30) -> None:
        self.distiller = distiller
        self.need_logits = need_logits
        self.limit_bytes = limit_bytes
        self.kept_bytes = 0
        self._kept: dict[int, EncoderStates] = {}

    def get(self, step: int, batch: Batch) -> EncoderStates:
        """The teacher's answer for the batch of `step`; the caller gives the same batch for the same step."""
        states = self._kept.get(step)
        if states is None:
            states = self.distiller.targets(batch, need_logits=self.need_logits)
            size = states_bytes(states)
            if self.kept_bytes + size <= self.limit_bytes:
                self._kept[step] = states
                self.kept_bytes += size
        return states
