"""Prepared text: folders of token shards that `ffnas prepare` wrote, read by mapping.

    FOLDER/  manifest.json   shard-00000/ shard-00001/ ...   (each as `EncodedDataset.save` writes it)

An epoch goes through the rows of every source as often as its weight says: weight 2 is twice, 0.5 a seeded half.
Batches are a function of (seed, epoch) and of the manifest alone, so a training step number is a position in the text.

Chosen: many shards behind one index of rows. Rejected: one file; a killed preparation would have to tell which part of
it is good, and moving it between file systems takes one very long copy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.data.batching import Batch, plan_batches
from engine.data.dataset import EncodedDataset
from engine.data.sources import MANIFEST
from engine.data.tokenizing import check_max_length
from engine.errors import UserError

FORMAT = 1


@dataclass(frozen=True, eq=False)
class ShardedText:
    """Rows of several shards as one data set; the part of `EncodedDataset` that training uses.

    Attributes:
        shards: mapped from disk.
        rows: [N] int64, numbers of the rows in use, counted over all shards.
        lengths: [N] int64 tokens per row.
        key: sha256 (hex) of the manifests and of what was chosen from them.
        sources: rows of each source, in their order; () where they count as one.
    """

    shards: tuple[EncodedDataset, ...]
    rows: np.ndarray
    lengths: np.ndarray
    key: str
    sources: tuple[int, ...] = ()
    choices = 1

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum())

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides the batches."""
        return self.key

    def num_batches(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return -(-len(self) // batch_size)

    def batches(self, batch_size: int, *, seed: int = 0, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """Batches of one epoch from step `start_step` on, in an order that (seed, epoch) decide."""
        plan = plan_batches(self.lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        return (self.collate(rows) for rows in plan[start_step:])

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """The rows at `rows` as one padded batch."""
        rows = self.rows[np.asarray(rows, dtype=np.int64)]
        ends = np.cumsum([len(shard) for shard in self.shards])
        places = np.searchsorted(ends, rows, side="right")
        parts = []
        for place in np.unique(places):
            inside = np.flatnonzero(places == place)
            shard = self.shards[place]
            parts.append((inside, shard.collate(rows[inside] - (ends[place] - len(shard)))))
        width = max(part.input_ids.shape[1] for _, part in parts)
        shape = (len(rows), width)
        ids = torch.full(shape, self.shards[0].pad_id, dtype=torch.int64)
        mask = torch.zeros(shape, dtype=torch.bool)
        for inside, part in parts:
            where = torch.from_numpy(inside)
            ids[where, : part.input_ids.shape[1]] = part.input_ids
            mask[where, : part.input_ids.shape[1]] = part.attention_mask
        return Batch(ids, mask, torch.zeros(shape, dtype=torch.int64))

    def select(self, indices: Sequence[int] | np.ndarray) -> ShardedText:
        """The rows at `indices`, in that order; nothing is copied."""
        chosen = np.asarray(indices, dtype=np.int64)
        key = hashlib.sha256(self.key.encode() + chosen.tobytes()).hexdigest()
        return replace(self, rows=self.rows[chosen], lengths=self.lengths[chosen], key=key, sources=())

    def first(self, count: int) -> ShardedText:
        """The first `count` rows."""
        return self if count >= len(self) else self.select(np.arange(count))

    def of_sources(self, count: int) -> ShardedText:
        """The rows of the first `count` sources."""
        return self.first(sum(self.sources[:count])) if count < len(self.sources) else self

    def subset(self, count: int, seed: int = 0) -> ShardedText:
        """At most `count` rows drawn without replacement, in their original order."""
        if count >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:count]))


def load_prepared(folders: Sequence[str], tokenizer: Any, *, max_positions: int | None = None) -> ShardedText:
    """Map the shards of `folders`.

    Args:
        folders: written by `ffnas prepare`.
        tokenizer: of the model that is to read them.
        max_positions: tokens the model has positions for.

    Raises:
        UserError: not finished, not intact in size, or made for another tokenizer or longer sequences.
    """
    shards: list[EncodedDataset] = []
    chosen: list[np.ndarray] = []
    digest = hashlib.sha256()
    begin = 0
    for name in folders:
        folder = Path(name).expanduser()
        manifest = read_manifest(folder)
        if manifest["tokenizer"]["sha256"] != tokenizer_hash(tokenizer):
            raise UserError(
                f"data.text {name}: prepared with tokenizer {manifest['tokenizer']['name']!r}, the teacher has another"
                f" one: ffnas prepare --tokenizer with the teacher's name (--paper-exact true for kd.paper_exact)"
            )
        check_max_length(int(manifest["max_length"]), tokenizer, max_positions)
        digest.update(json.dumps(manifest, sort_keys=True).encode())
        for number, source in enumerate(manifest["sources"]):
            count = 0
            for shard in (s for s in manifest["shards"] if s["source"] == number):
                data = EncodedDataset.load(folder / shard["folder"])
                if len(data) != shard["rows"]:
                    raise UserError(f"{folder / shard['folder']}: {len(data)} rows, the manifest has {shard['rows']}")
                shards.append(data)
                count += len(data)
            chosen.append(begin + weighted_rows(count, float(source["weight"]), seed=number))
            begin += count
    rows = np.concatenate(chosen)
    if len(rows) == 0:
        raise UserError(f"data.text {', '.join(folders)}: no rows in it: prepare more text")
    lengths = np.concatenate([shard.lengths for shard in shards])[rows]
    return ShardedText(tuple(shards), rows, lengths, digest.hexdigest(), tuple(map(len, chosen)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished preparation.

    Raises:
        UserError: there is none that can be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST} ({error}): run ffnas prepare again") from error
    return manifest


def weighted_rows(count: int, weight: float, seed: int) -> np.ndarray:
    """int64 row numbers of one source in an epoch: every row floor(weight) times, and a seeded share once more."""
    whole = int(weight)
    extra = round((weight - whole) * count)
    drawn = np.sort(np.random.default_rng([seed, count]).permutation(count)[:extra])
    return np.concatenate([np.tile(np.arange(count, dtype=np.int64), whole), drawn])


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 (hex) of what decides a tokenizer's ids, the same wherever it was loaded from."""
    if tokenizer.is_fast:
        plain = json.loads(tokenizer.backend_tokenizer.to_str())
        plain.pop("truncation", None)
        plain.pop("padding", None)
        text = json.dumps(plain, sort_keys=True)
    else:
        text = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    return hashlib.sha256(text.encode()).hexdigest()
