"""How answers of a kind of task are compared, with gold labels and with the teacher's; part of its `TaskHead`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from engine.data.results import Found
from engine.data.rows import NO_LABEL

if TYPE_CHECKING:
    from torch import Tensor

    from engine.data.batching import Batch
    from engine.data.dataset import EncodedDataset


class Comparison(ABC):
    """What of a `TaskHead` needs tensors and no task; names of sizes as there.

    Attributes:
        kind: name of the kind, for messages.
    """

    kind: ClassVar[str]

    @abstractmethod
    def gold_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss of outputs against gold labels, as batches hold them: a mean over what has a label, float32 scalar."""

    @abstractmethod
    def teacher_loss(self, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        """How far outputs are from the teacher's, 0 where they agree: T² KL, or a mean square. float32 scalar.

        Args:
            student, teacher: outputs of one shape (`answer_shape`).
            mask: [B, S] bool, True at real tokens.
            temperature: T > 0.
        """

    @abstractmethod
    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor | None,
        mask: Tensor,
        labels: Tensor | None,
        *,
        temperature: float,
        paper_exact: bool,
    ) -> Tensor:
        """The prediction term of `engine.objective`; arguments as of `teacher_loss`.

        Args:
            teacher: None where the teacher gave no outputs.
            labels: of the batch, if it has any.
            paper_exact: with the published code's arithmetic.

        Raises:
            UserError: what it needs is missing, or the outputs cannot be compared.
        """

    def places(self, batch: Batch) -> Tensor:
        """[B, S] bool, the tokens at which answers are compared: real ones."""
        return batch.mask

    def divergence(self, student: Tensor, teacher: Tensor, places: Tensor | None = None) -> Tensor:
        """How far answers [N, C] are from the teacher's, per row: KL(teacher || student), or a squared difference.

        `places` are those of the batch, for kinds that answer tokens.
        """
        raise NotImplementedError(f"{self.kind}: rows have no answer of their own")

    def outputs(self, data: EncodedDataset, found: Found) -> Any:
        """A model's outputs for all rows, in their order: [N, C], for `rows_apart`."""
        import torch

        parts = list(found)
        joined = torch.cat([outputs for _, outputs in parts])
        ordered = torch.empty_like(joined)
        ordered[torch.from_numpy(np.concatenate([rows for rows, _ in parts]))] = joined
        return ordered

    def rows_apart(self, own: Any, wanted: Any) -> Tensor:
        """[N] `divergence` of what `outputs` gave for the same rows, whatever tokens they were made of."""
        return self.divergence(own, wanted)

    def kept_apart(self, rows: np.ndarray, wanted: np.ndarray) -> float | None:
        """The mean divergence, from what is kept of each row of two models; None where that does not tell it."""
        import torch

        return float(self.divergence(torch.from_numpy(rows), torch.from_numpy(wanted)).mean())

    def no_labels(self, count: int, like: np.ndarray) -> np.ndarray:
        """Labels of `count` rows that have none, to stand beside those in `like`."""
        return np.full(count, NO_LABEL, dtype=like.dtype)
