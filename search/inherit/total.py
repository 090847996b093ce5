"""Token tables of finished students: whole, or made smaller, so that a student is small in all and not only its layers.

Layers are chosen with the teacher's whole table, which they all share; a winner gets its own before its full
distillation. A cut vocabulary keeps the pieces of the training texts, single characters and some frequent pieces; the
student then has a tokenizer of its own. A factorized table is trained; a whole or cut one stays as it is.

Under `budget.total` a student gets the first that fits of: everything, the cut vocabulary, the cut vocabulary at
falling ranks. Under `budget.params` all students of a run get the first that leaves a quarter of the teacher's layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from engine.architecture.architecture import Architecture
from engine.architecture.params import count_parameters
from engine.architecture.shape import ModelShape
from engine.data import Batch, EncodedDataset, EncodedTask, Rows, encode_task
from engine.data.smaller_vocabulary import kept_tokens, refusal, smaller_tokenizer
from engine.errors import UserError
from engine.student.modeling import FFNASPreTrainedModel
from engine.student.tables import cut_vocabulary, factorize_embeddings
from engine.student.vocabulary import Vocabulary
from search.context import Prepared
from search.inherit.last_round import freeze_embeddings
from search.inherit.variants import Variants

RANKS = (256, 192, 128, 96, 64)
"""Columns of factorized tables that `budget.total` may choose."""

FREQUENT = 1000
"""Pieces a cut vocabulary keeps although no training text has them: common words, for texts to come."""


@dataclass(frozen=True)
class Table:
    """How a student's token table is stored.

    Attributes:
        rank: columns of a factorized table, None for the teacher's own.
        cut: whether it has the rows of the smaller vocabulary alone.
    """

    rank: int | None = None
    cut: bool = False


class Tables:
    """What a run's students may have for token tables, and the data for them.

    Args:
        ctx: the run, or what it starts from.
        variants: what layers may become.

    Raises:
        UserError: the settings do not fit the teacher or its tokenizer.
    """

    def __init__(self, ctx: Prepared, variants: Variants) -> None:
        self.ctx, self.variants = ctx, variants
        self._check_settings()
        chosen, budget = ctx.config.inherit, ctx.config.budget
        if budget.total is not None:
            self.choices = self._possible()
        elif budget.params is not None:
            self.choices = [self._leaving_a_quarter(budget.params[1])]
        else:
            self.choices = [Table(chosen.embedding_rank, chosen.vocabulary == "seen")]

    def _possible(self) -> list[Table]:
        """What the settings allow, the dearest first."""
        chosen, shape = self.ctx.config.inherit, self.variants.shape
        ranks: list[int | None] = [chosen.embedding_rank]
        if chosen.embedding_rank is None and shape.embedding_size is None:
            ranks += [rank for rank in RANKS if rank < shape.hidden_size]
        cut = refusal(self.ctx.teacher.tokenizer) is None
        whole = [Table(ranks[0])] if cut and chosen.vocabulary == "full" else []
        return whole + [Table(rank, cut) for rank in ranks]

    def _leaving_a_quarter(self, most: float) -> Table:
        possible, whole = self._possible(), self.variants.whole
        layers = self.variants.encoder(whole)
        return next((t for t in possible if self.total(whole, t) - layers * 3 / 4 <= most), possible[-1])

    def check(self) -> None:
        """Raises `UserError` where the smallest student there can be is above `budget.total` or `budget.params`."""
        budget, made = self.ctx.config.budget, self.variants
        least = self.fixed + min(made.layer(spec) for spec in made.specs if not spec.skipped)
        if self.most is not None and least > self.most:
            share = (least + self._beside) / (made.total(made.whole) + self._beside)
            raise UserError(
                f"budget.total: {budget.total}: the smallest student has {least:,} parameters, {share:.3f} of the"
                " teacher's: raise it"
            )
        if budget.params is not None and least > budget.params[1]:
            raise UserError(
                f"budget.params: {budget.params[1]:,.0f}: the smallest student has {least:,} parameters: raise it"
            )

    def _check_settings(self) -> None:
        chosen, shape = self.ctx.config.inherit, self.variants.shape
        if chosen.embedding_rank is not None:
            if shape.embedding_size is not None:
                raise UserError(
                    f"inherit.embedding_rank: {chosen.embedding_rank}: this teacher's embedding is factorized already"
                    f" ({shape.embedding_size} columns): leave it out"
                )
            if chosen.embedding_rank >= shape.hidden_size:
                raise UserError(
                    f"inherit.embedding_rank: {chosen.embedding_rank} is no less than the teacher's hidden size"
                    f" {shape.hidden_size}: use a smaller one, or leave it out"
                )
        reason = refusal(self.ctx.teacher.tokenizer)
        if chosen.vocabulary == "seen" and reason is not None:
            raise UserError(
                f"inherit.vocabulary: seen: the teacher's tokenizer {reason}: use full"
                " (--inherit.embedding_rank makes the table smaller)"
            )

    @property
    def most(self) -> float | None:
        """Most parameters of embeddings and layers under `budget.total`; None where it is not given.

        Pooler and head count on both sides: the student has the teacher's.
        """
        share = self.ctx.config.budget.total
        if share is None:
            return None
        beside = self._beside
        return share * (self.variants.total(self.variants.whole) + beside) - beside

    @property
    def _beside(self) -> int:
        """Parameters of pooler and head."""
        everything = sum(p.numel() for p in self.ctx.teacher.model.parameters())
        return everything - self.variants.total(self.variants.whole)

    @property
    def fixed(self) -> int:
        """Parameters outside the layers, with the smallest table."""
        whole = self.variants.whole
        return min(self.total(whole, table) for table in self.choices) - self.variants.encoder(whole)

    def shape(self, table: Table) -> ModelShape:
        """Sizes of a model with this table and all layers."""
        shape = self.variants.shape
        if table.cut:
            shape = replace(shape, vocab_size=len(self.vocabulary))
        return shape if table.rank is None else replace(shape, embedding_size=table.rank, trigram=False)

    def total(self, architecture: Architecture, table: Table) -> int:
        """Parameters of embeddings and layers."""
        return count_parameters(architecture, self.shape(table), fit_dense=False)

    def choose(self, architecture: Architecture) -> Table:
        """The first table with which a student of these layers keeps `budget.total`.

        Raises:
            UserError: there is none.
        """
        most = self.most
        for table in self.choices:
            if most is None or self.total(architecture, table) <= most * (1 + 1e-9):  # as `Budget.fits`
                return table
        least = min(self.total(architecture, table) for table in self.choices)
        raise UserError(
            f"budget.total: {self.ctx.config.budget.total}: this student has {least:,} parameters with the smallest"
            " table: raise it, or lower --budget.encoder"
        )

    def student(self, model: FFNASPreTrainedModel, table: Table) -> FFNASPreTrainedModel:
        """`model` with this table, and with what is not to be trained frozen."""
        counts = np.bincount(self.ctx.data.train.tokens, minlength=model.config.vocab_size)
        if table.cut:
            model = cut_vocabulary(model, self.vocabulary.ids)
            counts = counts[self.vocabulary.ids.cpu().numpy()]
        if table.rank is not None:
            model = factorize_embeddings(model, table.rank, counts)
        freeze_embeddings(model)
        if table.rank is not None:
            model.base_model.embeddings.token_embeddings.weight.requires_grad_(True)
        return model

    def data(self, table: Table) -> EncodedTask:
        """The run's data in the numbers of this table; `text`, which this strategy does not use, stays as it is."""
        return self._smaller_data if table.cut else self.ctx.data

    def original(self, batch: Batch, table: Table) -> Batch:
        """A batch of `data` as the teacher wants it."""
        return self.vocabulary.original(batch) if table.cut else batch

    def tokenizer_of(self, table: Table) -> Any | None:
        """The student's own tokenizer, None where it has the teacher's."""
        return self.tokenizer if table.cut else None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the smaller vocabulary."""
        tokenizer = self.ctx.teacher.tokenizer
        kept = kept_tokens(tokenizer, self.ctx.data.train.tokens, frequent=FREQUENT)
        pad = int(np.searchsorted(kept, tokenizer.pad_token_id))
        return Vocabulary(torch.from_numpy(kept), pad).to(self.ctx.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The smaller tokenizer."""
        return smaller_tokenizer(self.ctx.teacher.tokenizer, self.vocabulary.ids.cpu().numpy())

    @cached_property
    def _smaller_data(self) -> EncodedTask:
        task, ctx = self.ctx.task, self.ctx

        def encoded(rows: Rows) -> EncodedDataset:
            length, positions = ctx.config.data.max_length, ctx.teacher.max_positions
            return encode_task(rows, task.spec, self.tokenizer, length, max_positions=positions, stride=task.stride)

        return replace(
            ctx.data,
            train=self.vocabulary.renumber(ctx.data.train),
            score=encoded(task.score),
            select=encoded(task.select),
            dev=encoded(task.dev),
            further={name: encoded(rows) for name, rows in task.further.items()},
        )
