"""First weights of a student from its teacher's embedding block, by truncated singular value decomposition.

The teacher's word table W [V, H_t], centred, has principal directions D [H_t, H_t] (columns, strongest first). The
student lives in the coordinates of the first H of them:

    token table [V, E]   (W - mean) D[:, :E]          dense, current token: identity; bias: mean D[:, :H]
    positions, segments  their teacher tables times D[:, :H]
    token table [V, H]   W D[:, :H]                    (full embedding)

so that before LayerNorm its embedding is the best rank-E approximation of the teacher's (Eckart and Young, 1936).
`fit_dense` is then set by least squares to map student embeddings to teacher embeddings on random tokens. Everything
else keeps the usual initialisation. Measured: docs/decisions/0019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel

NEIGHBOUR_STD = 0.002
"""Standard deviation of the trigram weights of the two neighbouring tokens: small beside the identity."""

_SEED = 0x5EED
_FIT_ROWS, _FIT_LENGTH = 48, 128
_RIDGE = 0.1


@torch.no_grad()
def init_from_teacher(student: FFNASPreTrainedModel, teacher_model: nn.Module) -> None:
    """Sets the student's embedding block and `fit_dense` from the teacher, in place and deterministically.

    Args:
        student: any FFNAS model; its encoder layers and heads are not touched.
        teacher_model: a transformers encoder with the same vocabulary.

    Raises:
        UserError: the vocabularies differ in size.
    """
    base = student.base_model
    tables = _teacher_tables(teacher_model)
    vocab = base.config.vocab_size
    if tables.words.shape[0] != vocab:
        raise UserError(
            f"vocab_size: the student has {vocab} tokens, the teacher {tables.words.shape[0]};"
            " build the student with the teacher's vocab_size and tokenizer"
        )
    mean = tables.words.mean(dim=0)
    directions = principal_directions(tables.words - mean)
    _set_tokens(base, tables.words, mean, directions)
    for embedding, table in (
        (base.embeddings.position_embeddings, tables.positions),
        (base.embeddings.segment_embeddings, tables.segments),
    ):
        if table is not None:
            _set_leading(embedding.weight, table @ directions[:, : embedding.weight.shape[1]])
    base.embeddings.layernorm.reset_parameters()
    if base.fit_dense is not None:
        _fit_projection(base, teacher_model)


@torch.no_grad()
def draw_padding_row(student: FFNASPreTrainedModel) -> None:
    """Gives padding's row of the token table a start like any other's, as EfficientBERT's published code does.

    It is not trained, and stays a neighbour of the last real token; drawn from torch's global generator.
    """
    config = student.config
    if config.pad_token_id is not None:
        row = student.base_model.embeddings.token_embeddings.weight[config.pad_token_id]
        row.normal_(0.0, config.initializer_range)


def principal_directions(table: Tensor) -> Tensor:
    """Eigenvectors of `table.T @ table` for a [V, W] table: float64 [W, W], one per column, strongest first.

    The sign of each is fixed: its entry of largest magnitude is positive.
    """
    table = table.double()
    vectors = torch.linalg.eigh(table.T @ table).eigenvectors.flip(dims=(1,))
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return vectors * largest.sign()


@dataclass(frozen=True)
class _Tables:
    """float64 tables of a teacher's embedding block: words [V, W], positions [P, W], segments [T, W]."""

    words: Tensor
    positions: Tensor | None
    segments: Tensor | None


def _teacher_tables(model: Any) -> _Tables:
    """Those of a transformers encoder of any family."""
    words = _on_cpu(model.get_input_embeddings().weight)
    block = getattr(model.base_model, "embeddings", None)
    positions = getattr(block, "position_embeddings", None)
    segments = getattr(block, "token_type_embeddings", getattr(block, "segment_embeddings", None))  # ours: the latter
    rows = None if positions is None else _on_cpu(positions.weight)
    if positions is not None and rows is not None and positions.padding_idx is not None:
        rows = rows[positions.padding_idx + 1 :]  # RoBERTa counts positions from there
    return _Tables(words, rows, None if segments is None else _on_cpu(segments.weight))


def _on_cpu(table: Tensor) -> Tensor:
    return table.detach().cpu().double()


def _set_tokens(base: FFNASModel, words: Tensor, mean: Tensor, directions: Tensor) -> None:
    table, dense = base.embeddings.token_embeddings.weight, base.embeddings.dense
    if dense is None:
        _set_leading(table, words @ directions[:, : table.shape[1]])
        return
    width, hidden = table.shape[1], dense.weight.shape[0]
    _set_leading(table, (words - mean) @ directions[:, :width])
    if base.config.pad_token_id is not None:
        table[base.config.pad_token_id] = 0  # see `engine.student.embeddings`
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.empty(dense.weight.shape).normal_(0.0, NEIGHBOUR_STD, generator=generator)
    current = width if base.embeddings.trigram else 0
    noise[:, current : current + width] = torch.eye(hidden, width)
    dense.weight.copy_(noise)
    dense.bias.zero_()
    _set_leading(dense.bias, mean @ directions[:, :hidden])


def _set_leading(target: Tensor, value: Tensor) -> None:
    """Copies the part both have; a wider target keeps zeros, a longer one its own further rows."""
    part = tuple(slice(min(a, b)) for a, b in zip(target.shape, value.shape, strict=True))
    if target.dim() == 2:
        target[part[0]] = 0
    target[part] = value[part].to(target)


def _fit_projection(base: FFNASModel, teacher: nn.Module) -> None:
    """Least squares for fit_dense(student embedding) = teacher embedding on uniformly random tokens.

    The ridge keeps weights small in directions in which student embeddings hardly vary; without it the first hidden
    losses of the deeper layers are up to twice as high, because their outputs do vary there.
    """
    rows = _sequence_limit(teacher)
    length = min(_FIT_LENGTH, base.config.max_position_embeddings, rows)
    generator = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, base.config.vocab_size, (_FIT_ROWS, length), generator=generator)
    x, y = _embed(base.embeddings, ids), _embed(getattr(teacher.base_model, "embeddings", None), ids)
    projection = base.fit_dense
    if projection is None or y is None or x is None or y.shape[-1] != projection.out_features:
        return  # the teacher's embedding block has another width than its layers (ELECTRA), or cannot be told apart
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y)
    projection.weight.copy_(weight.T)
    projection.bias.copy_(y_mean - x_mean @ weight)


def _sequence_limit(teacher: nn.Module) -> int:
    table = getattr(getattr(teacher.base_model, "embeddings", None), "position_embeddings", None)
    return _FIT_LENGTH if table is None else table.num_embeddings - 1 - (table.padding_idx or 0)


def _embed(block: nn.Module | None, ids: Tensor) -> Tensor | None:
    """Embedding block's output for [B, S] ids in evaluation mode: float64 [B S, width] on the CPU."""
    if block is None:
        return None
    modules = [m for m in block.modules() if m.training]
    block.eval()
    out = block(input_ids=ids.to(next(block.parameters()).device))
    for module in modules:
        module.training = True
    return out.double().cpu().flatten(0, 1)
