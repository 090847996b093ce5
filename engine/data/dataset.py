"""`EncodedDataset`: tokenized rows as a few flat arrays, in memory or mapped from disk.

Rows lie end to end in one int32 token array; `offsets` says where each begins, `second` where its second text begins.
Files are one `.npy` per array and a `meta.json`, read with `allow_pickle=False`, mapped rather than loaded by default.

Chosen: flat arrays and offsets. Rejected: a padded [N, max_length] matrix, which at 128 tokens stores about six times
as many zeros as tokens for the demo's sentences; and an Arrow table, whose list columns give the same layout behind a
library call per batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine.data.batching import Batch, collate, plan_batches
from engine.data.rows import NO_LABEL, Rows, join_rows
from engine.errors import UserError

FORMAT = 1
_HASH_BLOCK = 1 << 24


@dataclass(frozen=True, eq=False)
class Spans:
    """What turns token positions of windows back into text.

    Attributes:
        question: [N] int64, the row of `questions` that each window belongs to.
        start, end: [T] int32, the characters of its text that each token covers (of question answering: its context);
            start -1 outside.
        questions: the rows as they were read: texts, names and, where known, golds.
    """

    question: np.ndarray
    start: np.ndarray
    end: np.ndarray
    questions: Rows

    def select(self, windows: np.ndarray, tokens: np.ndarray) -> Spans:
        """Those of the windows at `windows`, whose tokens are at `tokens`; `questions` stay as they are."""
        return replace(self, question=self.question[windows], start=self.start[tokens], end=self.end[tokens])


@dataclass(frozen=True, eq=False)
class EncodedDataset:
    """N tokenized rows.

    Attributes:
        tokens: [T] int32, all rows end to end, special tokens included, no padding.
        offsets: [N + 1] int64, row i is `tokens[offsets[i]:offsets[i + 1]]`.
        second: [N] int32, position inside the row where token type 1 begins; the row's length where it never does.
        labels: [N] int64 class ids, float32 targets, [N, 2] int64 first and last token of an answer, or None; with
            `labels_per_token` [T] int64, `NO_LABEL` where a token has none.
        pad_id: token id of padding.
        uses_token_types: whether the tokenizer's model takes `token_type_ids` (BERT does, RoBERTa and DistilBERT not).
        truncated: rows that were cut to `max_length`.
        choices: sequences per row; of several, `tokens`, `offsets` and `second` hold N * choices sequences, and the
            length of a row is that of its longest.
        spans: of kinds that read windows, what turns token positions back into text.
        sources: rows of each source of text, in their order; () where they count as one.
        labels_per_token: whether there is a label for each of `tokens`; batches then hold them as [B, S].
    """

    tokens: np.ndarray
    offsets: np.ndarray
    second: np.ndarray
    labels: np.ndarray | None = None
    pad_id: int = 0
    uses_token_types: bool = True
    truncated: int = 0
    choices: int = 1
    spans: Spans | None = None
    sources: tuple[int, ...] = ()
    labels_per_token: bool = False
    _hash: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        sequences = len(self.offsets) - 1
        wrong = (
            self.tokens.dtype not in (np.int32, np.uint16)
            or (self.offsets.dtype, self.second.dtype) != (np.int64, np.int32)
            or sequences < 0
            or sequences % self.choices
            or len(self.second) != sequences
            or (self.labels is not None and len(self.labels) != len(self.tokens if self.labels_per_token else self))
            or self.offsets[0] != 0
            or self.offsets[-1] != len(self.tokens)
        )
        if wrong:
            raise ValueError("arrays of an encoded data set do not fit together")

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.choices

    @property
    def lengths(self) -> np.ndarray:
        """[N] int64 tokens per row."""
        lengths = np.diff(self.offsets)
        return lengths if self.choices == 1 else lengths.reshape(-1, self.choices).max(axis=1)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.tokens)

    def row(self, index: int) -> np.ndarray:
        """[length] int32 (or uint16) token ids of one sequence."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def batches(
        self,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        bucket: bool = True,
        drop_last: bool = False,
        max_tokens: int | None = None,
        pad_to_multiple: int = 1,
        start_step: int = 0,
    ) -> Iterator[Batch]:
        """Batches of one epoch in an order that (seed, epoch) alone decide; options as in `plan_batches`.

        `start_step=k` skips the first k batches without reading them, so training resumes where it stopped.
        """
        plan = plan_batches(
            self.lengths,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
            bucket=bucket,
            drop_last=drop_last,
            pad_to_multiple=pad_to_multiple,
        )
        return (self.collate(rows, pad_to_multiple=pad_to_multiple) for rows in plan[start_step:])

    def num_batches(
        self,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        bucket: bool = True,
        drop_last: bool = False,
        max_tokens: int | None = None,
        pad_to_multiple: int = 1,
    ) -> int:
        """Batches `batches` yields with the same options; with `batch_size` the same number every epoch."""
        if batch_size is not None and max_tokens is None and batch_size > 0:
            return len(self) // batch_size if drop_last else -(-len(self) // batch_size)
        return len(
            plan_batches(
                self.lengths,
                batch_size=batch_size,
                max_tokens=max_tokens,
                seed=seed,
                epoch=epoch,
                shuffle=shuffle,
                bucket=bucket,
                drop_last=drop_last,
                pad_to_multiple=pad_to_multiple,
            )
        )

    def collate(self, rows: Sequence[int] | np.ndarray, *, pad_to_multiple: int = 1) -> Batch:
        """The rows at `rows` as one padded batch."""
        chosen = np.asarray(rows, dtype=np.int64)
        sequences = (chosen[:, None] * self.choices + np.arange(self.choices)).ravel()
        batch = collate(
            self.tokens,
            self.offsets,
            self.second,
            sequences,
            pad_id=self.pad_id,
            pad_to_multiple=pad_to_multiple,
        )
        if self.choices > 1:
            batch = batch.map(lambda tensor: tensor.unflatten(0, (-1, self.choices)))
        if self.labels is not None and self.labels_per_token:
            places = self.offsets[sequences][:, None] + np.arange(batch.input_ids.shape[-1])
            mask = batch.mask.numpy()
            labels = np.full(mask.shape, NO_LABEL, dtype=np.int64)
            labels[mask] = self.labels[places[mask]]
            batch.labels = torch.from_numpy(labels)
        elif self.labels is not None:
            batch.labels = torch.from_numpy(np.ascontiguousarray(self.labels[chosen]))
        return batch

    def select(self, indices: Sequence[int] | np.ndarray) -> EncodedDataset:
        """A data set of the rows at `indices`, in that order, its arrays copied into memory."""
        chosen = np.asarray(indices, dtype=np.int64)
        rows = (chosen[:, None] * self.choices + np.arange(self.choices)).ravel()
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        labelled = source if self.labels_per_token else chosen
        return replace(
            self,
            tokens=np.asarray(self.tokens[source]),
            offsets=offsets,
            second=np.asarray(self.second[rows]),
            labels=None if self.labels is None else np.asarray(self.labels[labelled]),
            spans=None if self.spans is None else self.spans.select(chosen, source),
            truncated=0,
            sources=(),
            _hash=[],
        )

    def first(self, count: int) -> EncodedDataset:
        """The first `count` rows."""
        return self if count >= len(self) else self.select(np.arange(count))

    def last(self, share: float) -> EncodedDataset:
        """The last rows, a share of all, at least one."""
        count = max(1, round(share * len(self)))
        return self if count >= len(self) else self.select(np.arange(len(self) - count, len(self)))

    def of_sources(self, count: int) -> EncodedDataset:
        """The rows of the first `count` sources of text."""
        return self.first(sum(self.sources[:count])) if count < len(self.sources) else self

    def subset(self, count: int, seed: int = 0) -> EncodedDataset:
        """At most `count` rows drawn without replacement, in their original order."""
        if count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the batches; computed once."""
        if not self._hash:
            plain = [FORMAT, self.pad_id, self.uses_token_types] + ([self.choices] if self.choices > 1 else [])
            digest = hashlib.sha256(json.dumps(plain).encode())
            if self.spans is not None:
                digest.update(json.dumps([astuple(gold) for gold in self.spans.questions.golds or ()]).encode())
            for array in (self.tokens, self.offsets, self.second, self.labels):
                if array is None:
                    digest.update(b"none")
                    continue
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                for block in range(0, len(array), _HASH_BLOCK):
                    digest.update(np.ascontiguousarray(array[block : block + _HASH_BLOCK]).data)
            self._hash.append(digest.hexdigest())
        return self._hash[0]

    def save(self, path: str | Path) -> None:
        """Write the folder `path`, whole or not at all; an existing one is replaced.

        Raises:
            ValueError: it has `spans`, whose texts are not kept in arrays.
        """
        from engine.files import atomic_directory

        if self.spans is not None:
            raise ValueError("a data set with texts is encoded again, not saved")
        with atomic_directory(Path(path)) as folder:
            for name, array in self._arrays().items():
                np.save(Path(folder) / f"{name}.npy", array, allow_pickle=False)
            meta: dict[str, Any] = {
                "format": FORMAT,
                "pad_id": self.pad_id,
                "uses_token_types": self.uses_token_types,
                "truncated": self.truncated,
                "labels": self.labels is not None,
                "choices": self.choices,
                **({"labels_per_token": True} if self.labels_per_token else {}),
            }
            (Path(folder) / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = True) -> EncodedDataset:
        """Read a folder that `save` wrote; with `mmap` pages are read when they are needed.

        Raises:
            UserError: `path` is not such a folder.
        """
        path = Path(path)
        mode: Literal["r"] | None = "r" if mmap else None
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, expected {FORMAT}")
            names = ["tokens", "offsets", "second", *(["labels"] if meta["labels"] else [])]
            arrays = {n: np.load(path / f"{n}.npy", mmap_mode=mode, allow_pickle=False) for n in names}
            return cls(
                **arrays,
                pad_id=int(meta["pad_id"]),
                uses_token_types=bool(meta["uses_token_types"]),
                truncated=int(meta["truncated"]),
                choices=int(meta.get("choices", 1)),
                labels_per_token=bool(meta.get("labels_per_token", False)),
            )
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path} is not a saved data set ({error}): encode the data again") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {"tokens": self.tokens, "offsets": self.offsets, "second": self.second}
        return arrays if self.labels is None else {**arrays, "labels": self.labels}


def join(parts: Sequence[EncodedDataset]) -> EncodedDataset:
    """The rows of several data sets of one task and tokenizer, one after the other; each is a source of its own."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(len(part.tokens) for part in parts[:-1])])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=True)]
    labels = [part.labels for part in parts if part.labels is not None]
    return replace(
        parts[0],
        tokens=np.concatenate([part.tokens for part in parts]),
        offsets=np.concatenate([*offsets, [sum(len(part.tokens) for part in parts)]]).astype(np.int64),
        second=np.concatenate([part.second for part in parts]),
        labels=np.concatenate(labels) if labels else None,
        spans=_joined([part.spans for part in parts if part.spans is not None]),
        truncated=sum(part.truncated for part in parts),
        sources=tuple(len(part) for part in parts),
        _hash=[],
    )


def _joined(parts: Sequence[Spans]) -> Spans | None:
    if not parts:
        return None
    questions = [part.questions for part in parts]
    starts = np.cumsum([0, *(len(rows) for rows in questions[:-1])])
    return Spans(
        np.concatenate([part.question + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.end for part in parts]),
        join_rows(questions),
    )
