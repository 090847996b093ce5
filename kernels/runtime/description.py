"""What a model is for the runtime: sizes, layers with their programs, names of its answers; and which arrays it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

EMBEDDINGS = ("full", "factorized", "trigram")
POOLINGS = ("none", "cls", "mean")
ACTIVATIONS = ("tanh", "relu", "gelu", "gelu_erf")
PRECISIONS = ("fp32", "bf16", "int8")
"""Of matrix products."""

HEADS = ("none", "sequence", "tokens")

Arrays = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


class NativeError(ValueError):
    """A native model cannot be used; one line says which field or file is wrong, and what to do."""


@dataclass(frozen=True)
class Answers:
    """What callers know of a model.

    Attributes:
        hidden_size: width of token vectors.
        positions: most tokens of a sequence.
        head: scores per `sequence`, per `tokens`, or `none`.
        pools: whether there is a vector per sequence.
        labels: names of the scores, in order.
        regression: whether the scores are numbers instead of classes.
        max_length: tokens per sequence that the model was trained on; longer texts are cut.
        precision: of matrix products, where a session is not asked for another.
    """

    hidden_size: int
    positions: int
    head: str = "none"
    pools: bool = False
    labels: tuple[str, ...] = ()
    regression: bool = False
    max_length: int = 512
    precision: str = PRECISIONS[0]


@dataclass(frozen=True)
class Layer:
    """heads: of attention, 0 for no attention block; stack: FFNs, 0 for none; inner: their width; program: words."""

    heads: int
    stack: int = 0
    inner: int = 0
    program: tuple[int, ...] = ()


@dataclass(frozen=True)
class Description:
    """A model but for its arrays.

    Attributes:
        answers: as callers see it.
        head_size, vocab_size, types: sizes; types are rows of the table of token types.
        eps: LayerNorm's.
        embedding: how token rows become hidden ones; `token_width` is their width.
        pooling: a vector per sequence from its tokens' (`activation` of the pooler's dense layer, for cls).
    """

    answers: Answers
    head_size: int
    vocab_size: int
    types: int
    eps: float
    layers: tuple[Layer, ...]
    embedding: str = "full"
    token_width: int = 0
    pooling: str = "none"
    activation: str = "tanh"

    def arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the arrays the model has; weights are [outputs, inputs]."""
        hidden = self.answers.hidden_size
        width = hidden if self.embedding == "full" else self.token_width
        yield "embeddings.token", (self.vocab_size, width)
        yield "embeddings.position", (self.answers.positions, hidden)
        yield "embeddings.type", (self.types, hidden)
        if self.embedding != "full":
            yield from _dense("embeddings.dense", hidden, width * (3 if self.embedding == "trigram" else 1))
        yield from _norm("embeddings.norm", hidden)
        for index, layer in enumerate(self.layers):
            name, heads = f"layers.{index}", layer.heads * self.head_size
            if heads:
                for part in ("query", "key", "value"):
                    yield from _dense(f"{name}.{part}", heads, hidden)
                yield from _dense(f"{name}.output", hidden, heads)
                yield from _norm(f"{name}.norm", hidden)
            for ffn in range(layer.stack):
                yield from _dense(f"{name}.ffn.{ffn}.first", layer.inner, hidden)
                yield from _dense(f"{name}.ffn.{ffn}.second", hidden, layer.inner)
                yield from _norm(f"{name}.ffn.{ffn}.norm", hidden)
        if self.pooling == "cls":
            yield from _dense("pooler", hidden, hidden)
        if self.answers.head != "none":
            yield from _dense("classifier", len(self.answers.labels), hidden)


def _dense(name: str, outputs: int, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (outputs, inputs)
    yield f"{name}.bias", (outputs,)


def _norm(name: str, hidden: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (hidden,)
    yield f"{name}.bias", (hidden,)


def check_arrays(description: Description, arrays: Arrays) -> Iterator[tuple[str, Any]]:
    """The arrays the model has, contiguous.

    Raises:
        NativeError: one is missing or has another shape or dtype.
    """
    for name, shape in description.arrays():
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise NativeError(f"arrays: {name} is {what}, the description asks for float32 {list(shape)}")
        yield name, np.ascontiguousarray(found)
