"""The block library: every layer of the teacher in every variant, fitted to the teacher's own block and scored.

A variant's second products are refitted by least squares to what the whole block computes
(`engine.student.calibration`); its score is minus the KL divergence of the teacher's answers with that one block
replaced. Scores are trials of the ledger, stage "library"; what else a resumed run needs follows from the seed and is
computed again, in seconds. A variant with fewer heads and a narrower FFN counts as the sum of the two alone.

Texts are rows of the training split, never of score, select or dev.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import Batch
from engine.data.task import TaskHead
from engine.student.attention import extended_mask
from engine.student.calibration import LayerStatistics, calibrate, fit_inner, refit, reorder
from engine.student.encoder import FFNASLayer
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel
from engine.student.supernet import extract
from engine.training.loop import cycle
from search.context import Context, Prepared
from search.inherit.variants import Variants, kept, with_layer
from search.ledger.ledger import Trial

STAGE = "library"
BATCH = 32

Block = Callable[[Tensor, Any], Tensor]
"""Output [B, S, H] of a block for its input and the extended mask."""


@dataclass
class Library:
    """What students are put together from.

    Attributes:
        model: the teacher, neurons and heads of every layer sorted by importance; eval mode.
        statistics: of its layers, in that order.
        variants: what a layer may become.
        head: of the task; says how far answers are apart.
        losses: [L, V], replace-one KL divergence.
        answers: held-out training texts with the teacher's logits, for scores without labels.
    """

    model: FFNASPreTrainedModel
    statistics: list[LayerStatistics]
    variants: Variants
    head: TaskHead
    losses: np.ndarray
    answers: list[tuple[Batch, Tensor]] = field(default_factory=list)

    def read(self, trials: Iterable[Trial]) -> None:
        """Takes over the losses of recorded trials; joint variants are the sum of two."""
        for trial in trials:
            self.losses[divmod(trial.number, len(self.variants.specs))] = -(trial.score or 0.0)
        for choice, (heads, width) in self.variants.joint.items():
            self.losses[:, choice] = self.losses[:, heads] + self.losses[:, width]

    def assemble(self, architecture: Architecture) -> FFNASPreTrainedModel:
        """A student of this architecture: slices of the teacher with refitted products, without dropout."""
        student = extract(self.model, architecture)
        layers = [architecture.layers[index] for index in kept(architecture)]
        for layer, spec, index in zip(student.base_model.encoder, layers, kept(architecture), strict=True):
            self._fit(layer, spec, index)
        return without_dropout(student)

    def block(self, index: int, spec: LayerSpec) -> Block:
        """Layer `index` as `spec` makes it, fitted; the skipped layer gives back what it is given."""
        if spec.skipped:
            return lambda x, _: x
        alone = without_dropout(extract(self._alone(index), Architecture((spec,)))).eval()
        layer, plan = alone.encoder[0], alone.planner.full[0]
        self._fit(layer, spec, index)
        return lambda x, mask: layer(x, mask, plan)[0]

    @torch.no_grad()
    def _fit(self, layer: FFNASLayer, spec: LayerSpec, index: int) -> None:
        """Replaces the second product, and the output projection of attention, by their least-squares fits."""
        whole, found = self.model.base_model.encoder[index], self.statistics[index]
        shape = self.variants.shape
        if spec.stack:
            ffn: Any = layer.all_ffn[0]  # of full weights, which a type cannot tell
            source: Any = whole.all_ffn[0]
            width = ffn.dense1.out_features
            if spec.expression != self.variants.expression:
                weight, bias = fit_inner(ffn, spec.expression, source, self.variants.expression, found.inputs)
            elif width < source.dense1.out_features:
                weight, bias = refit(found.inner, source.dense2.weight, source.dense2.bias, width)
            else:
                weight, bias = source.dense2.weight, source.dense2.bias
            ffn.dense2.weight.copy_(weight)
            ffn.dense2.bias.copy_(bias)
        if spec.heads and spec.heads < (shape.num_heads or 0):
            attention = whole.block
            size = attention.head_size
            weight, bias = refit(found.context, attention.dense.weight, attention.dense.bias, spec.heads * size)
            layer.block.dense.weight.copy_(weight)
            layer.block.dense.bias.copy_(bias)

    def _alone(self, index: int) -> FFNASModel:
        """Layer `index` as an encoder of one layer, on shared weights and next to no embeddings."""
        config = copy.deepcopy(self.model.config)
        assert config.layers is not None  # since the configuration was made
        layer = config.layers[index]
        sizes = {"vocab_size": 1, "max_position_embeddings": 1, "type_vocab_size": 1, "num_hidden_layers": 1}
        for name, value in {**sizes, "layers": [layer], "pad_token_id": None, "source_layers": None}.items():
            setattr(config, name, value)
        with torch.device("meta"):
            base = FFNASModel(config, add_pooling_layer=False)
        base.embeddings.to_empty(device="cpu")
        base.encoder[0] = self.model.base_model.encoder[index]
        return base


Module = TypeVar("Module", bound=nn.Module)


def without_dropout(module: Module) -> Module:
    """The module with every dropout off: short distillation is faster and no worse without."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        if isinstance(getattr(part, "p_drop", None), float):
            setattr(part, "p_drop", 0.0)  # noqa: B010  of several classes
    return module


def build_library(ctx: Context, variants: Variants) -> Library:
    """Calibrates, sorts and scores; scores that are in the ledger are read from it."""
    batches = _texts(ctx)
    with ctx.timed("library"):
        library = _calibrated(ctx, variants, batches)
        known = {trial.number: trial for trial in ctx.ledger.trials(STAGE)}
        numbers = scored_numbers(variants)
        if not set(numbers) <= set(known):
            _score(ctx, library, batches, numbers, known)
        library.read(known.values())
    return library


def known_library(ctx: Prepared, variants: Variants, trials: Sequence[Trial]) -> Library | None:
    """The library of a finished run from its recorded trials: calibrated and sorted again, in seconds, and not scored.

    None where the trials are not those of all these variants. `ctx` has the fine-tuned teacher.
    """
    keys = {trial.number: trial.key for trial in trials}
    for number in scored_numbers(variants):
        index, choice = divmod(number, len(variants.specs))
        if keys.get(number) != with_layer(variants.whole, index, variants.specs[choice]).key():
            return None
    library = _calibrated(ctx, variants, _texts(ctx))
    library.read(trials)
    return library


def scored_numbers(variants: Variants) -> list[int]:
    """Numbers of the trials of a whole library."""
    return [
        index * len(variants.specs) + choice
        for index, choice in product(range(variants.shape.num_layers), variants.alone)
    ]


def _calibrated(ctx: Prepared, variants: Variants, batches: Iterator[Batch]) -> Library:
    """Statistics of the teacher on the first texts, and its layers sorted by them."""
    model = copy.deepcopy(ctx.teacher.model)
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False).eval()
    statistics = reorder(model, calibrate(model, _until(batches, ctx.config.inherit.calibration_tokens)))
    losses = np.zeros((variants.shape.num_layers, len(variants.specs)))
    return Library(model, statistics, variants, ctx.spec.head, losses)


def _score(
    ctx: Context, library: Library, batches: Iterator[Batch], numbers: Sequence[int], known: dict[int, Trial]
) -> None:
    """Adds the trials of `numbers` that are not known to `known` and to the ledger."""
    for batch in _until(batches, ctx.config.inherit.score_tokens):
        with torch.no_grad():
            logits = library.model(
                batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
            ).logits
        library.answers.append((batch, logits.float()))
    costs = [0.0 if number in known else _cost(library.variants, number) for number in numbers]
    with ctx.reporter.phase("block library", len(numbers), costs=costs) as bar:
        passes = _passes(library)
        for done, number in enumerate(numbers):
            if number not in known:
                known[number] = _scored(library, *divmod(number, len(library.variants.specs)), passes)
                ctx.ledger.record(known[number])
                if ctx.scalars is not None:
                    ctx.scalars.trial(known[number])
            bar.update(done + 1, "")


def _cost(variants: Variants, number: int) -> float:
    """What scoring a variant costs beside the others: every layer above it is run, and it is fitted and run itself."""
    index, choice = divmod(number, len(variants.specs))
    return 0.0 if variants.specs[choice] == variants.own else 1.0 + variants.shape.num_layers - index


def _texts(ctx: Prepared) -> Iterator[Batch]:
    """Endless batches of training rows on the run's device."""
    for batch in cycle(ctx.data.train, BATCH, seed=ctx.seed("inherit", "texts")):
        yield batch.to(ctx.device)


def _until(batches: Iterator[Batch], tokens: int) -> Iterator[Batch]:
    """Batches until so many real tokens are reached, at least one."""
    seen = 0
    while seen < tokens:
        batch = next(batches)
        seen += batch.num_tokens
        yield batch


@torch.no_grad()
def _passes(library: Library) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """Per batch the input of every layer and the last output, the extended mask, and the mask."""
    base = library.model.base_model
    found = []
    for batch, _ in library.answers:
        ids, types = batch.input_ids.flatten(0, -2), batch.token_type_ids.flatten(0, -2)
        x = base.embeddings(ids, types)
        mask = extended_mask(base.config, x, batch.mask)
        states = [x]
        for layer, plan in zip(base.encoder, base.planner.full, strict=True):
            states.append(layer(states[-1], mask, plan)[0])
        found.append((states, mask, batch.mask))
    return found


@torch.no_grad()
def _scored(library: Library, index: int, choice: int, passes: list[tuple[list[Tensor], Tensor, Tensor]]) -> Trial:
    """The trial of one variant of one layer."""
    began = time.monotonic()
    variants, base = library.variants, library.model.base_model
    spec = variants.specs[choice]
    total, error, scale, rows = 0.0, 0.0, 0.0, 0
    if spec != variants.own:
        block = library.block(index, spec)
        for (states, mask, real), (_, wanted) in zip(passes, library.answers, strict=True):
            x = block(states[index], mask)
            target = states[index + 1][real]
            error += float((x[real] - target).square().sum())
            scale += float((target - target.mean()).square().sum())
            for later in range(index + 1, variants.shape.num_layers):
                x = base.encoder[later](x, mask, base.planner.full[later])[0]
            own = library.model.answer(x, real)
            assert own is not None
            total += float(library.head.divergence(own.view(wanted.shape), wanted).sum())
            rows += len(wanted)
    architecture = with_layer(variants.whole, index, spec)
    return Trial(
        stage=STAGE,
        number=index * len(variants.specs) + choice,
        architecture=architecture,
        key=architecture.key(),
        score=-total / max(1, rows),
        params=variants.total(architecture),
        seconds=time.monotonic() - began,
        attrs={"layer": index, "error": error / max(scale, 1e-12)},
    )
