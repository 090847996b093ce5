"""A tokenizer that knows the pieces a task needs, and cuts everything else into those.

Removing pieces that never occur in a text leaves how it is cut as it was: WordPiece takes the longest piece it knows,
Unigram the likeliest cut, and neither changes where pieces go that were not taken. Words that need a removed piece are
cut into smaller ones; every single character stays, so that none becomes unknown.

BPE puts pieces together step by step: a piece that occurs needs all the steps that lead to it, and merges that lead
nowhere any more would still be taken. It is refused. Rejected: renumbering ids behind the whole tokenizer. Whoever
loads the model would need that table too, and words outside would have no row at all.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError

_PLACEHOLDER = re.compile(r"\[unused\d+\]")
_ID_FILES = ("vocab.txt", "vocab.json", "added_tokens.json")
"""Files beside tokenizer.json that number tokens; left out of the copy, whose tokenizer.json says all."""


def refusal(tokenizer: Any) -> str | None:
    """Why this tokenizer's vocabulary cannot be cut, in words that follow "the tokenizer"; None where it can."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return "is not a fast one"
    kind = type(backend.model).__name__
    if kind == "BPE":
        return "is BPE, whose pieces are put together step by step"
    return None if kind in ("WordPiece", "Unigram") else f"is of kind {kind}"


def kept_tokens(
    tokenizer: Any, token_ids_of_data: np.ndarray | Iterable[np.ndarray], *, frequent: int = 0
) -> np.ndarray:
    """Token ids that a smaller vocabulary for this data keeps, [R] int64, increasing.

    They are: special and added tokens; every single character, and its form inside a word (`##a`); pieces with a
    character that has no such form; every piece that occurs in the data; and of the other pieces the `frequent` ones
    with the lowest ids, which in most vocabularies are the most frequent.

    Args:
        tokenizer: a fast WordPiece or Unigram tokenizer of `transformers`.
        token_ids_of_data: token ids of the data, an array of any shape or several.
        frequent: how many pieces are added to those.

    Raises:
        UserError: the tokenizer is of another kind, an id is none of its own, or `frequent` is negative.
    """
    if isinstance(frequent, bool) or not isinstance(frequent, int) or frequent < 0:
        raise UserError(f"frequent: {frequent!r:.60} is out of range; give a whole number >= 0")
    whole = _description(tokenizer)
    pieces, special = _pieces(whole), {token["content"] for token in whole["added_tokens"]}
    ids = {**pieces, **{token["content"]: token["id"] for token in whole["added_tokens"]}}
    kept = {ids[name] for name in special} | {pieces[piece] for piece in _characters(whole["model"], pieces, special)}
    known = set(ids.values())
    arrays = [token_ids_of_data] if isinstance(token_ids_of_data, np.ndarray) else token_ids_of_data
    for array in arrays:
        seen = set(np.unique(array).tolist())
        if strange := sorted(seen - known):
            raise UserError(
                f"token_ids_of_data: {strange[0]} is no id of the tokenizer {tokenizer.name_or_path!r}; encode the data"
                " with this tokenizer"
            )
        kept |= seen
    others = sorted(n for piece, n in pieces.items() if n not in kept and not _PLACEHOLDER.fullmatch(piece))
    return np.array(sorted(kept.union(others[:frequent])), dtype=np.int64)


def smaller_tokenizer(tokenizer: Any, kept: np.ndarray) -> Any:
    """A tokenizer of the same class with the tokens `kept` alone; the new id of token `kept[k]` is k.

    Texts whose pieces are all kept get the same pieces; saved and loaded like any other.

    Args:
        tokenizer: a fast WordPiece or Unigram tokenizer of `transformers`; not changed.
        kept: [R] ids, increasing, special and added tokens among them, as `kept_tokens` gives them.

    Raises:
        UserError: the tokenizer is of another kind, or `kept` lacks a special token, is not increasing, or names none.
    """
    kept = np.asarray(kept)
    whole = _description(tokenizer)
    if kept.ndim != 1 or not len(kept) or kept.dtype.kind not in "iu" or (np.diff(kept.astype(np.int64)) <= 0).any():
        raise UserError("kept: must be token ids in increasing order, each once; use those of kept_tokens")
    number = {int(old): new for new, old in enumerate(kept)}
    expected = _renumber(whole, number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        for extra in _ID_FILES:
            (folder / extra).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
        settings = folder / "tokenizer_config.json"
        described = json.loads(settings.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in described:
            decoder = described["added_tokens_decoder"].items()
            described["added_tokens_decoder"] = {str(number[int(n)]): v for n, v in decoder if int(n) in number}
            settings.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
        made = type(tokenizer).from_pretrained(folder, local_files_only=True)
    made.name_or_path = tokenizer.name_or_path
    made.init_kwargs["name_or_path"] = tokenizer.name_or_path
    made.model_max_length = tokenizer.model_max_length
    if made.get_vocab() != expected:
        raise UserError(
            f"kept: the tokenizer {tokenizer.name_or_path!r} numbers its tokens in a way that cannot be cut; use its"
            " whole vocabulary"
        )
    return made


def _description(tokenizer: Any) -> dict[str, Any]:
    """Content of its tokenizer.json. Raises `UserError` where the vocabulary cannot be cut."""
    reason = refusal(tokenizer)
    if reason is not None:
        name = getattr(tokenizer, "name_or_path", "")
        raise UserError(
            f"vocabulary: the tokenizer {name!r} {reason}, and cannot be cut; use its whole vocabulary"
            " (a lower rank makes its table smaller)"
        )
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _pieces(whole: dict[str, Any]) -> dict[str, int]:
    """Pieces of the model and their ids, added tokens outside it left out."""
    model = whole["model"]
    if model["type"] == "Unigram":
        return {piece: n for n, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _characters(model: dict[str, Any], pieces: dict[str, int], special: set[str]) -> set[str]:
    """Pieces without which a word could become unknown."""
    if model["type"] == "Unigram":
        scores = [score for _, score in model["vocab"]]
        lowest = model["vocab"][int(np.argmin(scores))][0]  # the penalty of an unknown character counts from there
        unknown = {model["vocab"][model["unk_id"]][0]} if model.get("unk_id") is not None else set()
        raw = {piece for piece in pieces if re.fullmatch(r"<0x[0-9A-F]{2}>", piece)}
        return {piece for piece in pieces if len(piece) == 1} | {lowest} | unknown | raw
    inside = model["continuing_subword_prefix"]
    kept = {model["unk_token"]} & pieces.keys()
    for piece in pieces:
        if piece in special or _PLACEHOLDER.fullmatch(piece):
            continue
        within = piece.startswith(inside) and len(piece) > len(inside)
        text = piece[len(inside) :] if within else piece
        forms = [inside + c for c in text] if within else [text[:1], *(inside + c for c in text[1:])]
        if len(text) == 1 or any(form not in pieces for form in forms):
            kept.add(piece)
    return kept


def _renumber(whole: dict[str, Any], number: dict[int, int]) -> dict[str, int]:
    """Gives the tokens of a tokenizer.json, in place, their new ids, and drops the others; tokens and new ids."""
    model, pieces = whole["model"], _pieces(whole)
    ids = {**pieces, **{token["content"]: token["id"] for token in whole["added_tokens"]}}
    strange = sorted(number.keys() - set(ids.values()))
    if strange:
        raise UserError(f"kept: {strange[0]} is no id of the tokenizer; use ids below {1 + max(ids.values())}")
    needed = [token["content"] for token in whole["added_tokens"]]
    needed += [model["unk_token"]] if model.get("unk_token") in pieces else []
    needed += [model["vocab"][model["unk_id"]][0]] if model.get("unk_id") is not None else []
    missing = [name for name in needed if ids[name] not in number]
    if missing:
        raise UserError(f"kept: the special token {missing[0]!r} ({ids[missing[0]]}) is left out; keep it")
    new = {piece: number[old] for piece, old in ids.items() if old in number}
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
        model["vocab"] = [entry for n, entry in enumerate(model["vocab"]) if n in number]
    else:
        model["vocab"] = {piece: new[piece] for piece, old in model["vocab"].items() if old in number}
    for token in whole["added_tokens"]:
        token["id"] = number[token["id"]]
    if whole.get("padding"):
        whole["padding"]["pad_id"] = new[whole["padding"]["pad_token"]]
    if whole.get("post_processor"):
        _renumber_processor(whole["post_processor"], new)
    return new


def _renumber_processor(processor: dict[str, Any], new: dict[str, int]) -> None:
    """The same for what puts special tokens around texts."""
    for inner in processor.get("processors", ()):
        _renumber_processor(inner, new)
    if processor["type"] == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [new[token] for token in entry["tokens"]]
    for name in ("cls", "sep"):
        if name in processor:
            token = processor[name][0]
            processor[name] = [token, new[token]]
