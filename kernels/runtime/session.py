"""Texts to answers on one native model."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .description import PRECISIONS, SENTENCES, Arrays, Description, NativeError
from .folder import TOKENIZER, read_answers
from .library import UNIT, WANTED, Encoder
from .texts import Batch, Text, batches, check_texts, likeliest, load_tokenizer, softmax

if TYPE_CHECKING:
    import numpy as np

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
        self._need("sequence", "whole texts")
        rows = self._rows(self._tokenize(texts), batch_size, "head")
        if d.regression:
            return [{"label": d.labels[0], "score": row[0]} for row in rows]
        return [likeliest(d.labels, row) for row in rows]

    def scores(self, texts: Text | Sequence[Text], batch_size: int = 32) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Logits [texts, labels]; texts of like length are computed together."""
        if self.answers.head not in ("sequence", "choice"):
            raise NativeError(f"scores: the model's are per {self.answers.head}, not per text; use `run`")
        return _matrix(self._rows(self._tokenize(texts), batch_size, "head"), self._encoder.outputs)

    def embed(
        self, texts: Text | Sequence[Text], pooling: str | None = None, normalize: bool = False, batch_size: int = 32
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """A vector per text [texts, H], of those of its tokens.

        Args:
            texts: what to embed.
            pooling: their `mean`, the first one (`cls`), or the `max` of each column; None for the model's own way.
            normalize: whether vectors are divided by their length.
            batch_size: texts per pass.

        Raises:
            NativeError: there is no such pooling, or no tokenizer.
        """
        pooling = self.answers.sentence if pooling is None else pooling
        if pooling not in SENTENCES:
            raise NativeError(f"pooling: must be one of {', '.join(SENTENCES)}, got {pooling!r:.60}")
        rows = self._rows(self._tokenize(texts), batch_size, pooling, UNIT if normalize else 0)
        return _matrix(rows, self.answers.hidden_size)

    def tag(self, texts: str | Sequence[str], batch_size: int = 32) -> list[list[dict[str, Any]]]:
        """For each text its tokens: the likeliest `label`, its probability `score`, and from where to where in the text
        they are (`start`, `end`). Tokens that the tokenizer adds are left out.

        Raises:
            NativeError: the model has no labels per token, or no tokenizer.
        """
        d = self.answers
        self._need("tokens", "tokens")
        encodings, width = self._tokenize(texts), len(d.labels)
        found = []
        for e, row in zip(encodings, self._rows(encodings, batch_size, "head"), strict=True):
            real = (i for i in range(len(e.ids)) if not e.special_tokens_mask[i])
            found.append(
                [
                    {**likeliest(d.labels, row[i * width : (i + 1) * width]), "start": start, "end": end}
                    for i in real
                    for start, end in [e.offsets[i]]
                ]
            )
        return found

    def fill(self, texts: str | Sequence[str], top: int = 5) -> list[list[list[dict[str, Any]]]]:
        """For each text, for each mask in it, the `top` likeliest words: `token` and its probability `score`.

        Raises:
            NativeError: the model fills no masks, a text has none (or beyond `max_length`), or there is no tokenizer.
        """
        import numpy as np

        self._need("mask", "masks")
        mask, found = self.answers.mask_token, []
        for e in self._tokenize(texts):
            number = self._tokenizer.token_to_id(mask)
            places = [i for i, token in enumerate(e.ids) if token == number]
            if not places:
                raise NativeError(f"texts: no {mask} within the first {self.answers.max_length} tokens of a text")
            ids, types = (np.array([v], np.int64) for v in (e.ids, e.type_ids))
            scores = self._encoder.run_at(ids, None, types, np.array(places), self._precision(ids, None, types))
            odds = np.exp((scores - scores.max(1, keepdims=True)).astype(np.float64))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            chances = np.take_along_axis(odds / odds.sum(1, keepdims=True), best, 1).tolist()
            words = [[self._tokenizer.id_to_token(i) for i in row] for row in best.tolist()]
            found.append(
                [[{"token": w, "score": p} for w, p in zip(*r, strict=True)] for r in zip(words, chances, strict=True)]
            )
        return found

    def choose(self, text: str, choices: Sequence[str]) -> dict[str, Any]:
        """Which of the choices goes with the text: `choice` (its number), `label` (itself) and its probability `score`.

        Raises:
            NativeError: the model makes no choices, there are none, or no tokenizer.
        """
        self._need("choice", "choices")
        if not choices:
            raise NativeError("choices: there are none")
        rows = self._rows(self._tokenize([(text, choice) for choice in choices]), len(choices), "head")
        found = softmax(row[0] for row in rows)
        best = max(range(len(found)), key=found.__getitem__)
        return {"choice": best, "label": choices[best], "score": found[best]}

    def encode(self, texts: Sequence[Text]) -> list[Mapping[str, list[int]]]:
        """input_ids and token_type_ids of each text, cut to `answers.max_length`.

        Raises:
            NativeError: there is no tokenizer, or something is no text.
        """
        return [{"input_ids": e.ids, "token_type_ids": e.type_ids} for e in self._tokenize(texts)]

    def run(
        self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, wanted: str = "head"
    ) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One pass over ids.

        Args:
            input_ids: whole numbers [B, S]; for a model that chooses also [B, choices, S], as the others then are.
            attention_mask: [B, S], true or 1 at real tokens; None where all are.
            token_type_ids: [B, S]; None for all 0.
            wanted: `head`: logits [B, labels], or [B, S, labels] (-1e4 at padding), or [B, choices]; `hidden`: the last
                layer's output [B, S, H] (0 at padding); `pooled`, `mean`, `cls` or `max`: a vector per sequence [B, H].

        Raises:
            NativeError: shapes differ, ids are outside the vocabulary, a sequence is empty or too long.
        """
        import numpy as np

        d = self.answers
        if wanted not in WANTED:
            raise NativeError(f"wanted: must be one of {', '.join(WANTED)}, got {wanted!r:.60}")
        if (wanted == "head" and d.head == "none") or (wanted == "pooled" and not d.pools):
            raise NativeError(f"wanted: the model has no {wanted}; ask for hidden")
        ids = np.ascontiguousarray(input_ids, np.int64)
        if ids.ndim == 3 and d.head == "choice" and 0 not in ids.shape:
            mask, types = (
                None if v is None else np.reshape(v, (-1, ids.shape[2])) for v in (attention_mask, token_type_ids)
            )
            found = self.run(ids.reshape(-1, ids.shape[2]), mask, types, wanted)
            return found.reshape(*ids.shape[:2], -1).squeeze(2) if wanted == "head" else found
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

    def _need(self, head: str, of: str) -> None:
        if self.answers.head != head:
            raise NativeError(f"the model has no head for {of}; use `run`")

    def _tokenize(self, texts: Text | Sequence[Text]) -> list[Any]:
        texts = [texts] if isinstance(texts, (str, tuple)) else list(texts)
        check_texts(texts)
        if self._tokenizer is None:
            file = None if self._folder is None else self._folder / TOKENIZER
            self._tokenizer = load_tokenizer(file, min(self.answers.max_length, self.answers.positions))
        found: list[Any] = self._tokenizer.encode_batch(texts)
        return found

    def _rows(self, encodings: Sequence[Any], size: int, wanted: str, unit: int = 0) -> list[array[float]]:
        """What each text gets: a row, or the rows of its tokens one after the other."""
        found: list[Any] = [None] * len(encodings)
        width, per_token = self._encoder.shape_of(wanted)
        for places, batch in batches(encodings, size):
            step = width * (batch.length if per_token else 1)
            out = array("f", bytes(4 * step * batch.rows))
            what, address = WANTED.index(wanted) + unit, out.buffer_info()[0]
            precision = self._precision_of(batch)
            self._encoder.call(
                batch.addresses(), batch.rows, batch.length, what, PADDING, (None, 0), address, precision
            )
            for row, place in enumerate(places):
                found[place] = out[row * step : (row + 1) * step]
        return found

    def _precision_of(self, batch: Batch) -> str | None:
        if not self._choices:
            return None
        import numpy as np

        kinds = ((batch.ids, np.int64), (batch.mask, np.uint8), (batch.types, np.int64))
        return self._precision(*(np.frombuffer(a, kind).reshape(batch.rows, batch.length) for a, kind in kinds))


def _matrix(rows: Sequence[array[float]], width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    import numpy as np

    return np.frombuffer(b"".join(rows), np.float32).reshape(len(rows), width).copy()
