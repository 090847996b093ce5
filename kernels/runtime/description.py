"""What a model is for the runtime: sizes, layers with their programs, names of its answers; and which arrays it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

EMBEDDINGS = ("full", "factorized", "trigram")
POOLINGS = ("none", "cls", "mean")
ACTIVATIONS = ("tanh", "relu", "gelu", "gelu_erf")
PRECISIONS = ("fp32", "bf16", "int8")
"""Of matrix products."""

HEAD_CODES = {"none": 0, "sequence": 1, "tokens": 2, "mask": 3, "choice": 1}
"""Kinds of heads by name, as the library knows them: a choice is a score per sequence, compared by callers."""
SENTENCES = ("mean", "cls", "max")
"""Ways to one vector per text, from those of its tokens."""

Arrays = Mapping[str, Any]
"""NumPy arrays by name, float32. NumPy is imported where arrays are handled: answering texts does without."""


class NativeError(ValueError):
    """A native model cannot be used; one line says which field or file is wrong, and what to do."""


class Answers(NamedTuple):
    """What callers know of a model.

    Attributes:
        hidden_size: width of token vectors.
        positions: most tokens of a sequence.
        head: scores per `sequence`, per `tokens`, for every word at a `mask`, one per `choice`, or `none`.
        pools: whether there is a vector per sequence.
        labels: names of the scores, in order; none where they are the words of the vocabulary.
        regression: whether the scores are numbers instead of classes.
        max_length: tokens per sequence that the model was trained on; longer texts are cut.
        sentence: how `Session.embed` makes one vector of a text's, where it is not told.
        mask_token: what stands for a word to be filled in.
        precision: of matrix products, where a session is not asked for another.
    """

    hidden_size: int
    positions: int
    head: str = "none"
    pools: bool = False
    labels: tuple[str, ...] = ()
    regression: bool = False
    max_length: int = 512
    sentence: str = "mean"
    mask_token: str = ""
    precision: str = PRECISIONS[0]


class Layer(NamedTuple):
    """heads: of attention, 0 for no attention block; stack: FFNs, 0 for none; inner: their width; program: words."""

    heads: int
    stack: int = 0
    inner: int = 0
    program: tuple[int, ...] = ()


class Description(NamedTuple):
    """A model but for its arrays.

    Attributes:
        answers: as callers see it.
        head_size, vocab_size, types: sizes; types are rows of the table of token types.
        eps: LayerNorm's.
        embedding: how token rows become hidden ones; `token_width` is their width.
        pooling: a vector per sequence from its tokens' (`activation` of the pooler's dense layer, for cls).
        head_width: of the layer before the scores of words (`head.dense`, GELU, `head.norm`); 0 for other heads.
        tied: the weight of those scores is the token table.
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
    head_width: int = 0
    tied: bool = False

    @property
    def outputs(self) -> int:
        """Scores of the head, per sequence or token."""
        return self.vocab_size if self.answers.head == "mask" else len(self.answers.labels)

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
        if self.head_width:
            yield from _dense("head.dense", self.head_width, hidden)
            yield from _norm("head.norm", self.head_width)
        if self.answers.head != "none":
            dense = _dense("classifier", self.outputs, self.head_width or hidden)
            yield from (part for part in dense if not self.tied or part[0] != "classifier.weight")


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
    import numpy as np

    for name, shape in description.arrays():
        found = arrays.get(name)
        if found is None or found.shape != shape or found.dtype != np.float32:
            what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise NativeError(f"arrays: {name} is {what}, the description asks for float32 {list(shape)}")
        yield name, np.ascontiguousarray(found)
