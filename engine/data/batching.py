"""Batches: which rows go together, in what order, and how they become tensors.

The plan is a pure function of (lengths, options, seed, epoch), so any position of any epoch can be reached again
without reading the rows before it. Rows are shuffled, sorted by length inside windows of about 50 batches, cut into
batches of near-equal length, and the batches shuffled: little padding, and no order by length across steps.

Chosen: plan first, collate on demand with numpy gathers from the packed token array. Rejected: `torch.utils.data`'s
loader with a collating tokenizer; its worker processes cost more than the gather (a 32 x 128 batch takes about 0.1 ms)
and its order is tied to the state of a generator rather than to a step number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

WINDOW = 50
"""Batches per window inside which rows are sorted by length."""


@dataclass
class Batch:
    """One padded batch.

    Attributes:
        input_ids: [B, S] int64, padded with the tokenizer's pad id; of multiple choice [B, choices, S], and so are the
            next two.
        attention_mask: [B, S] bool, True at real tokens.
        token_type_ids: [B, S] int64, 1 in the second text of a pair where the tokenizer tells them apart, else 0.
        labels: [B] int64 class ids or float32 targets, [B, 2] int64 first and last token of an answer, or None.
        part: which part of its step's batch this is, 0 unless a step is cut into several (`engine.data.parts`).
        task: name of the task, where batches of several are mixed (`engine.data.mixture`).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor | None = None
    part: int = 0
    task: str = ""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def mask(self) -> torch.Tensor:
        """[rows, S] bool: the attention mask of the sequences an encoder sees, choices one after the other."""
        return self.attention_mask.flatten(0, -2)

    @property
    def num_tokens(self) -> int:
        """Real tokens; reads the mask, so it waits for the device the batch is on."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """The same batch with `change` applied to each of its tensors."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            attention_mask=change(self.attention_mask),
            token_type_ids=change(self.token_type_ids),
            labels=None if self.labels is None else change(self.labels),
        )


def plan_batches(
    lengths: np.ndarray,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    bucket: bool = True,
    drop_last: bool = False,
    pad_to_multiple: int = 1,
) -> list[np.ndarray]:
    """Row indices (int64) of each batch of one epoch, in training order.

    Args:
        lengths: [N] tokens of each row.
        batch_size: rows per batch; or
        max_tokens: most tokens per batch, padding included (a longer single row makes a batch by itself).
        seed: together with `epoch` decides the order.
        epoch: see `seed`.
        shuffle: random order, of rows and of batches.
        bucket: sort by length: inside windows when shuffling, else all rows at once, shortest first (for evaluation:
            least padding). With neither, rows come in the order they are stored.
        drop_last: leave out the batches that are not full (with `max_tokens`: the last one cut).
        pad_to_multiple: width that padding is rounded up to, counted by `max_tokens`.

    Raises:
        ValueError: not exactly one of `batch_size` and `max_tokens`, or not positive.
    """
    if (batch_size is None) == (max_tokens is None):
        raise ValueError("give either batch_size or max_tokens")
    if (batch_size or max_tokens or 0) < 1 or pad_to_multiple < 1:
        raise ValueError(f"batch_size={batch_size}, max_tokens={max_tokens}, pad_to_multiple={pad_to_multiple}: >= 1")
    count = len(lengths)
    if count == 0:
        return []
    order = np.arange(count, dtype=np.int64)
    generator = np.random.default_rng([seed, epoch])
    if shuffle:
        order = generator.permutation(order)
        if bucket:
            order = _sort_in_windows(order, lengths, WINDOW * (batch_size or _mean_rows(lengths, max_tokens)))
    elif bucket:
        order = np.argsort(lengths, kind="stable")
    if batch_size is not None:
        batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
        if drop_last and len(batches[-1]) < batch_size:
            batches.pop()
    else:
        widths = -(-lengths[order] // pad_to_multiple) * pad_to_multiple
        batches = _cut_by_tokens(order, widths, max_tokens)
        if drop_last:
            batches.pop()
    if shuffle and bucket:
        batches = [batches[i] for i in generator.permutation(len(batches))]
    return batches


def collate(
    tokens: np.ndarray,
    offsets: np.ndarray,
    second: np.ndarray,
    rows: np.ndarray,
    *,
    pad_id: int,
    pad_to_multiple: int = 1,
) -> Batch:
    """Gather `rows` of the packed arrays (see `EncodedDataset`) into one padded batch without labels."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    width = int(-(-lengths.max() // pad_to_multiple) * pad_to_multiple)
    columns = np.arange(width)
    mask = columns < lengths[:, None]
    input_ids = np.full(mask.shape, pad_id, dtype=np.int64)
    input_ids[mask] = tokens[(starts[:, None] + columns)[mask]]
    types = (mask & (columns >= second[rows][:, None])).astype(np.int64)
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(mask), torch.from_numpy(types))


def _sort_in_windows(order: np.ndarray, lengths: np.ndarray, window: int) -> np.ndarray:
    """`order` with each run of `window` entries sorted by length; ties keep their shuffled order."""
    windows = np.arange(len(order)) // window
    return order[np.lexsort((lengths[order], windows))]


def _mean_rows(lengths: np.ndarray, max_tokens: int | None) -> int:
    return max(1, int((max_tokens or 1) / max(1.0, float(lengths.mean()))))


def _cut_by_tokens(order: np.ndarray, widths: Sequence[int] | np.ndarray, max_tokens: int | None) -> list[np.ndarray]:
    """Greedy cut of `order` so that rows times widest row stays within `max_tokens`."""
    batches, start, widest = [], 0, 0
    for i, width in enumerate(np.asarray(widths).tolist()):
        widest = max(widest, width)
        if i > start and widest * (i - start + 1) > (max_tokens or 0):
            batches.append(order[start:i])
            start, widest = i, width
    batches.append(order[start:])
    return batches
