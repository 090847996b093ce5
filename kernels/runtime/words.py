"""A model as the words that csrc/cpu/encoder_api.h reads."""

from __future__ import annotations

from collections.abc import Callable

from .description import ACTIVATIONS, EMBEDDINGS, HEAD_CODES, POOLINGS, Description

_FLOAT32 = 0
_NOTHING = (0, 0, _FLOAT32)
_NO_DENSE = (*_NOTHING, *_NOTHING, 0, 0)


def model_words(
    d: Description, place: Callable[[str], tuple[int, int]], program: Callable[[int], tuple[int, int]]
) -> list[int]:
    """The words but for the version before them.

    Args:
        d: the model.
        place: where an array is, by name, and how many elements lie between its rows.
        program: where a layer's program is, by the layer's number, and how many words it has.
    """

    def matrix(name: str) -> tuple[int, int, int]:
        return (*place(name), _FLOAT32)

    def norm(name: str) -> tuple[int, ...]:
        return (*matrix(f"{name}.weight"), *matrix(f"{name}.bias"))

    def dense(name: str, outputs: int, inputs: int) -> tuple[int, ...]:
        return (*norm(name), outputs, inputs)

    a = d.answers
    hidden, labels = a.hidden_size, d.outputs
    width = hidden if d.embedding == "full" else d.token_width
    inputs = width * (3 if d.embedding == "trigram" else 1)
    words = [hidden, d.head_size, d.vocab_size, a.positions, d.types, EMBEDDINGS.index(d.embedding), width]
    for table in ("token", "position", "type"):
        words += matrix(f"embeddings.{table}")
    words += _NO_DENSE if d.embedding == "full" else dense("embeddings.dense", hidden, inputs)
    words += norm("embeddings.norm")
    words += [POOLINGS.index(d.pooling), ACTIVATIONS.index(d.activation), HEAD_CODES[a.head], labels]
    words += dense("pooler", hidden, hidden) if d.pooling == "cls" else _NO_DENSE
    words.append(d.head_width)
    words += [*dense("head.dense", d.head_width, hidden), *norm("head.norm")] if d.head_width else _NO_DENSE
    scores = matrix("embeddings.token" if d.tied else "classifier.weight") if a.head != "none" else ()
    words += (*scores, *matrix("classifier.bias"), labels, d.head_width or hidden) if scores else _NO_DENSE
    words.append(len(d.layers))
    for index, layer in enumerate(d.layers):
        name, heads = f"layers.{index}", layer.heads * d.head_size
        words += [layer.heads, layer.stack, layer.inner]
        if heads:
            for part in ("query", "key", "value"):
                words += dense(f"{name}.{part}", heads, hidden)
            words += [*dense(f"{name}.output", hidden, heads), *norm(f"{name}.norm")]
        if layer.stack:
            words += program(index)
        for ffn in (f"{name}.ffn.{i}" for i in range(layer.stack)):
            words += [*dense(f"{ffn}.first", layer.inner, hidden), *dense(f"{ffn}.second", hidden, layer.inner)]
            words += norm(f"{ffn}.norm")
    return words
