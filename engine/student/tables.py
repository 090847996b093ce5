"""Smaller token tables: fewer rows, or rows of fewer numbers.

The table of a small encoder is half of it (MiniLM-L6: 11.7 of 22.7 million parameters), and distillation of layers
leaves it as it is. `cut_vocabulary` drops rows, which changes nothing for texts without those tokens;
`factorize_embeddings` keeps all of them and stores each as r numbers and a map to H that all share, which changes every
row a little.

Rejected: an unweighted factorization. Half of a vocabulary hardly ever occurs, and would have half of the say.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.supernet import constructor_options

Student = TypeVar("Student", bound=FFNASPreTrainedModel)

_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
"""Fields of a config that hold a token's number; those after the first only if somebody has set them."""

_CHUNK = 1 << 15
"""Rows converted to float64 at a time."""


def cut_vocabulary(model: Student, kept_ids: Sequence[int] | np.ndarray | Tensor) -> Student:
    """A copy of `model` that knows some of its tokens only; row k of its token table is row `kept_ids[k]`.

    Its answers to a text of those tokens, renumbered, equal the model's own bit for bit.

    Args:
        model: a student of any embedding type; not changed.
        kept_ids: [R] different token ids, in the order of their new numbers; the padding token's is among them.

    Returns:
        A model of the same class, mode, device and dtype. `pad_token_id` and other tokens' numbers in its config are
        the new ones, None for tokens that are not kept.

    Raises:
        UserError: an id is not in the vocabulary or comes twice, the padding token is left out, or the model answers
            with tokens.
    """
    _refuse_decoder(model, "kept_ids")
    config = copy.deepcopy(model.config)
    ids = torch.as_tensor(np.asarray(kept_ids) if not isinstance(kept_ids, Tensor) else kept_ids).cpu()
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"kept_ids: give a flat list of token ids, got {list(ids.shape)} of {ids.dtype}")
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= config.vocab_size)]
    if len(outside):
        raise UserError(
            f"kept_ids: {int(outside[0])} is not in the vocabulary of {config.vocab_size} tokens; use ids below that"
        )
    if len(ids.unique()) < len(ids):
        twice = int(ids.bincount().argmax())
        raise UserError(f"kept_ids: {twice} comes {int((ids == twice).sum())} times; give every id once")
    number = {old: new for new, old in enumerate(ids.tolist())}
    if config.pad_token_id is not None and config.pad_token_id not in number:
        raise UserError(f"kept_ids: the padding token {config.pad_token_id} is left out; keep it")
    config.vocab_size = len(ids)
    for name in _TOKEN_IDS:
        old = getattr(config, name, None)
        if isinstance(old, int):
            setattr(config, name, number.get(old))
    prefix = _prefix(model)
    table = model.base_model.embeddings.token_embeddings.weight
    return _rebuilt(model, config, {f"{prefix}token_embeddings.weight": table[ids.to(table.device)]})


@torch.no_grad()
def factorize_embeddings(model: Student, rank: int, counts: np.ndarray | Tensor | None = None) -> Student:
    """A copy of `model` whose token table has `rank` columns, and a map from them to H.

    Among all tables A [V, r], maps D [H, r] and biases b [H] with b the mean row, it takes those that minimise

        sum_v w_v |T_v - (D A_v + b)|^2      w_v = (c_v + 1) / sum_u (c_u + 1)      b = sum_v w_v T_v

    with T [V, H] the table and c the counts. The solution: D holds the r eigenvectors of the largest eigenvalues of the
    weighted covariance M = sum_v w_v (T_v - b)(T_v - b)^T [H, H], and A_v = D^T (T_v - b). With r = H all of T_v comes
    back, to rounding. Computed in float64.

    Args:
        model: a student with a full embedding; not changed.
        rank: r, 1 to H.
        counts: [V] how often each token occurs in the texts the model is for; None: all the same.

    Returns:
        A model of the same class, mode, device and dtype with embedding_type "factorized" and embedding_size r.

    Raises:
        UserError: the embedding is not full, the rank is out of range, counts are not one number >= 0 per token, or the
            model answers with tokens.
    """
    config = copy.deepcopy(model.config)
    if config.embedding_type != "full":
        raise UserError(f"embedding_type: {config.embedding_type} cannot be factorized; use a model with a full one")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= config.hidden_size:
        raise UserError(f"rank: {rank!r:.60} is out of range; use 1 to the hidden size {config.hidden_size}")
    _refuse_decoder(model, "rank")
    table = model.base_model.embeddings.token_embeddings.weight
    weights = _weights(counts, len(table)).to(table.device)
    bias, directions = _principal(table, weights, rank)
    rows = torch.cat([((part.double() - bias) @ directions).to(table.dtype) for part in table.split(_CHUNK)])
    config.embedding_type, config.embedding_size = "factorized", rank
    prefix = _prefix(model)
    changed = {
        "token_embeddings.weight": rows,
        "dense.weight": directions.to(table.dtype),
        "dense.bias": bias.to(table.dtype),
    }
    return _rebuilt(model, config, {f"{prefix}{name}": tensor for name, tensor in changed.items()})


def _weights(counts: np.ndarray | Tensor | None, tokens: int) -> Tensor:
    """[V] float64, sum 1."""
    if counts is None:
        return torch.full((tokens,), 1.0 / tokens, dtype=torch.float64)
    found = torch.as_tensor(counts).cpu().double()
    if found.shape != (tokens,):
        raise UserError(f"counts: shape {list(found.shape)} for a vocabulary of {tokens}; give one count per token")
    wrong = found[~((found >= 0) & found.isfinite())]
    if len(wrong):
        raise UserError(f"counts: {float(wrong[0])} is no count; give numbers >= 0")
    return (found + 1) / (found + 1).sum()


def _principal(table: Tensor, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Mean row [H] and the `rank` main directions [H, r] around it, float64."""
    size = table.shape[1]
    mean = torch.zeros(size, dtype=torch.float64, device=table.device)
    moment = torch.zeros(size, size, dtype=torch.float64, device=table.device)
    parts = list(zip(table.split(_CHUNK), weights.split(_CHUNK), strict=True))
    for rows, weight in parts:
        mean += weight @ rows.double()
    for rows, weight in parts:
        centred = rows.double() - mean
        moment += centred.T @ (weight[:, None] * centred)
    _, vectors = torch.linalg.eigh(moment)  # eigenvalues increase
    return mean, vectors.flip(1)[:, :rank].contiguous()


def _refuse_decoder(model: FFNASPreTrainedModel, name: str) -> None:
    if model.get_output_embeddings() is not None:
        raise UserError(f"{name}: a {type(model).__name__} answers with tokens of its table; use a model without")


def _prefix(model: FFNASPreTrainedModel) -> str:
    """What names of the embeddings' tensors begin with."""
    return "embeddings." if model.base_model is model else f"{model.base_model_prefix}.embeddings."


def _rebuilt(model: Student, config: FFNASConfig, changed: dict[str, Tensor]) -> Student:
    """A model of this config with `changed` and copies of all other tensors of `model`."""
    options: dict[str, Any] = constructor_options(model)
    with torch.device("meta"):
        made = type(model)(config, **options)
    given = model.state_dict()
    state = {name: (changed[name] if name in changed else given[name]).detach().clone() for name in made.state_dict()}
    made.load_state_dict(state, assign=True)
    made.requires_grad_(True)
    return made.train(model.training)
