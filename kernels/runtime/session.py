"""Texts to answers on one native model."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.runtime.description import PRECISIONS, Arrays, Description, NativeError
from kernels.runtime.folder import TOKENIZER, read_answers
from kernels.runtime.library import WANTED, Encoder

Text = str | tuple[str, str]
"""A text, or a pair of texts."""

CHOICES = {"auto": ("fp32", "bf16"), "fastest": ("fp32", "bf16", "int8")}
"""Names for the faster ones of several precisions. Eight bits change answers: `auto` never takes them."""

_TRIALS = 4
"""Passes by which those compare; the first ones pack weights."""

PADDING = -1e4
"""Scores of padding tokens: no softmax gives them anything."""


class Session:
    """A model that answers texts, from any number of threads at once.

    Args:
        model: a folder written by `ffnas export RUN --native FOLDER`; or a description and its arrays, for ids alone.
        threads: None for as many as the process may use cores.
        precision: of the matrix products, `fp32`, `bf16` or `int8` (weights and activations in eight bits, sums exact);
            `auto`: of fp32 and bf16 the faster one here for each size of batches, which is measured when a size comes
            first (answers then differ a little from size to size); `fastest`: of all three. None: what the folder was
            exported with, fp32 unless `--precision` said another.

    Raises:
        NativeError: the model cannot be used; one line says why.

    Weights are packed at the first call, so that one takes longer. Arrays that were handed over must not be written to.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | tuple[Description, Arrays],
        *,
        threads: int | None = None,
        precision: str | None = None,
    ) -> None:
        if precision not in (None, *PRECISIONS, *CHOICES):
            known = ", ".join((*PRECISIONS, *CHOICES))
            raise NativeError(f"precision: must be one of {known}, got {precision!r:.60}")
        self._choices = CHOICES.get(precision or "", ())
        self._chosen: dict[tuple[int, int], str] = {}
        first = self._choices[0] if self._choices else precision
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        if type(threads) is not int or not 1 <= threads <= 4096:
            raise NativeError(f"threads: must be a whole number from 1 to 4096, got {threads!r:.60}")
        if isinstance(model, tuple):
            description, arrays = model
            first = first or description.answers.precision
            self._folder, self._encoder = None, Encoder.from_arrays(description, arrays, threads, first)
        else:
            self._folder = Path(model)
            answers = read_answers(self._folder)
            self._encoder = Encoder.from_folder(self._folder, answers, threads, first or answers.precision)
        self.answers = self._encoder.answers
        self._tokenizer: Any = None

    def __call__(self, texts: Text | Sequence[Text], batch_size: int = 32) -> list[dict[str, Any]]:
        """For each text the likeliest `label` and its probability `score`; of a regression the number alone.

        Raises:
            NativeError: the model has no head for sequences, or no tokenizer.
        """
        d = self.answers
        if d.head != "sequence":
            raise NativeError("the model has no head for whole texts; use `run`")
        scores = self.scores(texts, batch_size)
        if d.regression:
            return [{"label": d.labels[0], "score": float(row[0])} for row in scores]
        return [
            {"label": d.labels[int(best)], "score": float(row[best])}
            for row in _softmax(scores)
            for best in [row.argmax()]
        ]

    def scores(self, texts: Text | Sequence[Text], batch_size: int = 32) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits [texts, labels]; texts of like length are computed together."""
        encoded = self.encode([texts] if isinstance(texts, (str, tuple)) else list(texts))
        out = np.empty((len(encoded), len(self.answers.labels)), np.float32)
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]["input_ids"]))
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            out[part] = self.run(**_padded([encoded[i] for i in part]))
        return out

    def encode(self, texts: Sequence[Text]) -> list[Mapping[str, list[int]]]:
        """input_ids and token_type_ids of each text, cut to `answers.max_length`.

        Raises:
            NativeError: there is no tokenizer, or something is no text.
        """
        for text in texts:
            if not isinstance(text, str) and not (isinstance(text, tuple) and len(text) == 2):
                raise NativeError(f"texts: must be strings or pairs of them, got {text!r:.60}")
        return [{"input_ids": e.ids, "token_type_ids": e.type_ids} for e in self._tokenize(texts)]

    def run(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, wanted: str = "head"
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One pass over ids.

        Args:
            input_ids: whole numbers [B, S].
            attention_mask: [B, S], true or 1 at real tokens; None where all are.
            token_type_ids: [B, S]; None for all 0.
            wanted: `head`, `hidden` or `pooled`: logits [B, labels] (or [B, S, labels], -1e4 at padding), the last
                layer's output [B, S, H] (0 at padding), or a vector per sequence [B, H].

        Raises:
            NativeError: shapes differ, ids are outside the vocabulary, a sequence is empty or too long.
        """
        d = self.answers
        if wanted not in WANTED:
            raise NativeError(f"wanted: must be one of {', '.join(WANTED)}, got {wanted!r:.60}")
        if (wanted == "head" and d.head == "none") or (wanted == "pooled" and not d.pools):
            raise NativeError(f"wanted: the model has no {wanted}; ask for hidden")
        ids = np.ascontiguousarray(input_ids, np.int64)
        if ids.ndim != 2 or 0 in ids.shape:
            raise NativeError(f"input_ids: must be [sequences, tokens], got shape {list(ids.shape)}")
        mask = None if attention_mask is None else np.ascontiguousarray(np.asarray(attention_mask) != 0, np.uint8)
        types = None if token_type_ids is None else np.ascontiguousarray(token_type_ids, np.int64)
        for name, value in (("attention_mask", mask), ("token_type_ids", types)):
            if value is not None and value.shape != ids.shape:
                raise NativeError(f"{name}: has shape {list(value.shape)}, input_ids {list(ids.shape)}")
        return self._encoder.run(ids, mask, types, wanted, PADDING, self._precision(ids, mask, types))

    def _precision(self, ids: Any, mask: Any, types: Any) -> str | None:
        """What batches of this size run in where several precisions may be taken, else None."""
        if not self._choices:
            return None
        size = (ids.shape[0].bit_length(), ids.shape[1].bit_length())
        if size not in self._chosen:
            least = dict.fromkeys(self._choices, float("inf"))
            for _ in range(_TRIALS):
                for precision in self._choices:
                    began = time.perf_counter()
                    self._encoder.run(ids, mask, types, "hidden", PADDING, precision)
                    least[precision] = min(least[precision], time.perf_counter() - began)
            self._chosen[size] = min(self._choices, key=least.__getitem__)
        return self._chosen[size]

    def close(self) -> None:
        """Ends the session's threads and frees its weights; garbage collection does the same."""
        self._encoder.close()

    def _tokenize(self, texts: Sequence[Text]) -> list[Any]:
        if self._tokenizer is None:
            file = None if self._folder is None else self._folder / TOKENIZER
            if file is None or not file.is_file():
                raise NativeError(f"texts: the model has no {TOKENIZER}; give ids to `run`")
            try:
                from tokenizers import Tokenizer
            except ImportError as error:
                raise NativeError("texts: the tokenizers library is missing: pip install tokenizers") from error
            try:
                self._tokenizer = Tokenizer.from_file(str(file))
                self._tokenizer.no_padding()
                self._tokenizer.enable_truncation(min(self.answers.max_length, self.answers.positions))
            except Exception as error:  # whatever the library finds wrong with a file it does not type
                raise NativeError(f"{file}: not a tokenizer ({str(error)!r:.120}); export the model again") from error
        found: list[Any] = self._tokenizer.encode_batch(list(texts))
        return found


def _padded(encoded: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
    length = max(len(e["input_ids"]) for e in encoded)
    ids, types = (np.zeros((len(encoded), length), np.int64) for _ in range(2))
    mask = np.zeros((len(encoded), length), np.uint8)
    for row, e in enumerate(encoded):
        count = len(e["input_ids"])
        ids[row, :count], types[row, :count], mask[row, :count] = e["input_ids"], e["token_type_ids"], 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def _softmax(scores: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
