"""A smaller vocabulary: the token ids that given data contain, numbered anew, and a student with only their embeddings.

A candidate's proxy training sees a few thousand different tokens, its embedding table has thirty thousand rows.
Clearing and clipping the table's gradient and AdamW's two moments of it cost the same for every row. With it and with
the hidden-state loss in the student's precision, two populations of two demo candidates take 2.9 and 4.1 s where they
took 3.5 and 4.8 (two cores of an Intel Xeon, torch 2.13, one run each). A row that no batch contains only ever decays,
so leaving it out changes nothing else; the sum of squares of a gradient's norm merely gets fewer zeros.

Rejected: sparse gradients (`nn.Embedding(sparse=True)`). AdamW moves every row that ever had a gradient at every step,
so a sparse update that equals the dense one needs the rows' history. A table of the rows that occur needs nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from engine.data import Batch, EncodedDataset
from engine.student.modeling import FFNASPreTrainedModel

Student = TypeVar("Student", bound=FFNASPreTrainedModel)

WORTHWHILE = 0.5
"""A vocabulary of more than this share of the whole one is not worth renumbering."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Some token ids of a tokenizer, numbered 0 to R - 1 in increasing order.

    Attributes:
        ids: [R] int64, increasing; the padding token's among them.
        pad_id: the padding token's number.
    """

    ids: torch.Tensor
    pad_id: int

    @classmethod
    def of(cls, tokens: Iterable[np.ndarray], pad_id: int) -> Vocabulary:
        """The vocabulary of arrays of token ids, with the padding token `pad_id` (the tokenizer's number)."""
        arrays = [np.array([pad_id]), *(t for t in tokens if t.size)]
        seen = np.zeros(1 + max(int(t.max()) for t in arrays), dtype=bool)
        for array in arrays:
            seen[array] = True
        ids = np.flatnonzero(seen).astype(np.int64)
        return cls(torch.from_numpy(ids), int(np.searchsorted(ids, pad_id)))

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Vocabulary:
        """The same with `ids` on `device`, where `original` then copies nothing."""
        return replace(self, ids=self.ids.to(device))

    def renumber(self, data: EncodedDataset) -> EncodedDataset:
        """`data` with this vocabulary's numbers, and -1, which no table has, for every other token.

        Its batches are the same otherwise.
        """
        ids = self.ids.cpu().numpy()
        number = np.full(1 + max(int(ids[-1]), int(data.tokens.max(initial=0))), -1, dtype=np.int32)
        number[ids] = np.arange(len(ids), dtype=np.int32)
        return replace(data, tokens=number[data.tokens], pad_id=self.pad_id, _hash=[])

    def original(self, batch: Batch) -> Batch:
        """A renumbered batch with the tokenizer's ids again, as the teacher wants it."""
        return replace(batch, input_ids=self.ids.to(batch.input_ids.device)[batch.input_ids])

    def student(self, model: Student) -> Student:
        """`model` with the embeddings of this vocabulary alone; takes renumbered batches.

        Every other tensor is shared with `model`, which is not changed.

        Raises:
            ValueError: the model's padding token is another one, or its output is over tokens.
        """
        if model.get_output_embeddings() is not None:
            raise ValueError("student: the model answers with tokens of the whole vocabulary")
        if model.config.pad_token_id != int(self.ids[self.pad_id]):
            raise ValueError(f"student: the model's padding token is {model.config.pad_token_id}")
        config = copy.deepcopy(model.config)
        config.vocab_size, config.pad_token_id = len(self), self.pad_id
        with torch.device("meta"):
            smaller = type(model)(config)
        state = model.state_dict()
        prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
        name = f"{prefix}embeddings.token_embeddings.weight"
        state[name] = state[name][self.ids.to(state[name].device)]
        smaller.load_state_dict(state, assign=True)
        return smaller.train(model.training)


def of_first_batches(data: EncodedDataset, batch_size: int, seed: int, steps: int) -> list[np.ndarray]:
    """Token ids of the first `steps` batches that `engine.training.loop.cycle` makes of `data`: for `Vocabulary.of`."""
    if steps >= data.num_batches(batch_size):
        return [data.tokens]
    batches = data.batches(batch_size, seed=seed, epoch=0)
    return [next(batches).input_ids.numpy() for _ in range(steps)]
