"""Scores of many subnets of one supernet, with the work they share done once.

For every batch the candidates form a trie (`engine.evaluation.trie`) that is walked depth first: an attention block
runs once per distinct prefix, a stack of n + 1 FFNs continues from n, embeddings run once. **Logits equal those of
one-by-one evaluation over the same batches bit for bit**; a stack whose continuation would not have the same bits
(`engine.evaluation.continuation`) is run from its beginning.

Activations that others will need are kept within a budget (`engine.evaluation.kept_activations`), also from call to
call while the weights do not change; what was given up is computed again (docs/decisions/0014).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.architecture.architecture import Architecture
from engine.autocast import autocast
from engine.data import Batch, EncodedDataset, TaskSpec
from engine.evaluation.continuation import Continuation
from engine.evaluation.kept_activations import ActivationStore
from engine.evaluation.metrics import compute_metrics
from engine.evaluation.trie import Branch, Node, build_trie
from engine.student import FFNASForSequenceClassification
from engine.student.attention import extended_mask
from engine.student.encoder import require_whole_layers
from engine.student.ffn import FFNPlan
from engine.student.first_token import attend_first, reads_first

BUDGET_BYTES = 1 << 30
"""Activations kept, by default: 1 GiB."""


@dataclass
class _Run:
    """One batch on its way through the trie."""

    index: int
    embedded: Tensor
    mask: Any
    short: bool
    logits: list[Tensor]


class SharedEvaluator:
    """Evaluates subnets of a supernet over a data set cut into slices of batches.

    Args:
        model: the supernet, a sequence classifier; put into eval mode.
        data: encoded examples with labels.
        batch_size: sequences per batch; a slice's batches are of equal size, as few as this allows.
        precision: `"fp32"` or `"bf16"` (autocast).
        budget_bytes: activations to keep, at most; besides them a walk needs a few of one batch.
        slices: parts the data is cut into. One part has the batches of `engine.evaluation.evaluation.predict`; several
            are random samples of equal size, in which any number of first slices is a sample too (for
            `engine.evaluation.racing`).
        seed: of the slices.

    Attributes:
        batches: all batches, on the model's device.
        slices: for every slice the positions of its batches in `batches`.
        work: attention blocks (the last layer's first-token ones count as one) and calls of FFNs so far.
    """

    def __init__(
        self,
        model: FFNASForSequenceClassification,
        data: EncodedDataset,
        *,
        batch_size: int = 256,
        precision: str = "fp32",
        budget_bytes: int = BUDGET_BYTES,
        slices: int = 1,
        seed: int = 0,
    ) -> None:
        if data.labels is None or not len(data):
            raise ValueError("data: needs labelled examples")
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.precision = precision
        self.store = ActivationStore(budget_bytes)
        self.work = {"attention": 0, "ffn": 0}
        self.batches: list[Batch] = []
        self.slices: list[list[int]] = []
        for part in _parts(data, slices, seed):
            size = batch_size if slices == 1 else math.ceil(len(part) / math.ceil(len(part) / batch_size))
            made = [b.to(self.device) for b in part.batches(size, shuffle=False, bucket=True)]
            self.slices.append(list(range(len(self.batches), len(self.batches) + len(made))))
            self.batches += made
        self._continuation = Continuation()
        self._version: tuple[int, ...] = ()

    def labels(self, batches: Sequence[int] | None = None) -> np.ndarray:
        """[N] gold labels, in the order of `logits`."""
        chosen = self._chosen(batches)
        labels = [self.batches[i].labels for i in chosen]
        return torch.cat([given for given in labels if given is not None]).cpu().numpy()

    @torch.no_grad()
    def logits(self, candidates: Sequence[Architecture], batches: Sequence[int] | None = None) -> np.ndarray:
        """float32 [K, N, num_labels]: every candidate's logits, over all batches or those at these positions.

        Raises:
            UserError: the supernet does not store a candidate, or one has layers with fewer heads or without FFN.
        """
        if not candidates:
            raise ValueError("candidates: give at least one")
        self._forget_old_weights()
        planner = self.model.base_model.planner
        plans = [planner(c) for c in candidates]
        for plan in plans:
            require_whole_layers(plan, "shared evaluation")
        root = build_trie(plans)
        parts = []
        for index in self._chosen(batches):
            with autocast(self.device, self.precision):
                run = self._start(index, len(candidates))
                self._walk(run, root)
            parts.append(torch.stack(run.logits))
        return torch.cat(parts, dim=1).numpy()

    def evaluate(self, candidates: Sequence[Architecture], spec: TaskSpec) -> list[dict[str, float]]:
        """Every metric of the task over the whole data, per candidate; equal to evaluating them one by one."""
        labels = self.labels()
        return [compute_metrics(spec, logits, labels) for logits in self.logits(candidates)]

    def _chosen(self, batches: Sequence[int] | None) -> Sequence[int]:
        return range(len(self.batches)) if batches is None else batches

    def _forget_old_weights(self) -> None:
        """Empties the store if a parameter was written to or replaced since the last call."""
        version = tuple(v for p in self.model.parameters() for v in (p.data_ptr(), p._version))
        if version != self._version:
            self.store.clear()
            self._version = version
        self.model.eval()

    def _start(self, index: int, candidates: int) -> _Run:
        batch = self.batches[index]
        embedded = self.store.get((index,))
        if embedded is None:
            embedded = self.model.base_model.embeddings(batch.input_ids, batch.token_type_ids)
            self.store.put((index,), embedded, 0)
            self.store.release((index,))
        mask = extended_mask(self.model.config, embedded, batch.attention_mask)
        short = self.model.config.pooling == "cls" and reads_first(self.model.base_model.encoder[-1], mask)
        return _Run(index, embedded, mask, short, [torch.empty(0)] * candidates)

    def _walk(self, run: _Run, node: Node) -> None:
        if node.candidates:
            logits = self._logits(run, node)
            for candidate in node.candidates:
                run.logits[candidate] = logits
            return
        key = self._attention_key(run, node)
        self.store.pin(key)
        for branch in node.branches.values():
            for child in branch.stacks.values():
                self._walk(run, child)
            for stack in branch.stacks:
                self.store.drop(_step_key(run, node, branch.plan, stack))
        self.store.release(key)

    def _logits(self, run: _Run, leaf: Node) -> Tensor:
        x = self._after_ffns(run, leaf.parent, leaf.branch, leaf.stack)
        mask = self.batches[run.index].attention_mask
        return self._head(x[:, None] if run.short else x, mask).float().cpu()

    def _head(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, S, H] and [B, S] to [B, num_labels]; [B, 1, H] will do where the pooling reads the first token."""
        return self.model.classifier(self.model.base_model.cls_pooler(x, mask))

    def _after_attention(self, run: _Run, node: Node) -> Tensor:
        """[B, S, H] behind the attention block that follows a prefix; [B, H] where the first token is enough."""
        key = self._attention_key(run, node)
        found = self.store.get(key)
        if found is not None:
            return found
        layer = self.model.base_model.encoder[node.depth]
        x = run.embedded if node.parent is None else self._after_ffns(run, node.parent, node.branch, node.stack)
        if run.short and node.depth == self._depth - 1:
            x = attend_first(layer.attention, x, run.mask)
        else:
            x = layer.attention(x, run.mask)[0]
        self.work["attention"] += 1
        self.store.put(key, x, 2 * node.depth)
        return x

    def _after_ffns(self, run: _Run, node: Node | None, branch: Branch | None, stack: int) -> Tensor:
        """Output of the first `stack` FFNs of a branch below a node, continued from the longest stack at hand."""
        assert node is not None
        assert branch is not None
        key = _step_key(run, node, branch.plan, stack)
        found = self.store.get(key)
        if found is not None:
            return found
        ffns = self.model.base_model.encoder[node.depth].all_ffn
        begin, x = 0, None
        for shorter in sorted((s for s in branch.stacks if s < stack), reverse=True):
            x = self.store.get(_step_key(run, node, branch.plan, shorter))
            if x is not None and self._continuation.is_exact(ffns, branch.plan, x):
                begin = shorter
                break
        if begin == 0:
            x = self._after_attention(run, node)
        assert x is not None
        out = ffns.part(x, branch.plan, begin, stack)
        self.work["ffn"] += stack - begin
        if any(longer > stack for longer in branch.stacks):
            self.store.put(key, out, 2 * node.depth + 1)
        return out

    @property
    def _depth(self) -> int:
        return len(self.model.base_model.encoder)

    def _attention_key(self, run: _Run, node: Node) -> Hashable:
        return (run.index, node.prefix, run.short and node.depth == self._depth - 1)


def _step_key(run: _Run, node: Node, plan: FFNPlan, stack: int) -> Hashable:
    return (run.index, node.prefix, plan.program.digest, plan.inner, stack)


def _parts(data: EncodedDataset, slices: int, seed: int) -> list[EncodedDataset]:
    """The data in `slices` parts of (nearly) equal size, by a random permutation of its rows."""
    if not 1 <= slices <= len(data):
        raise ValueError(f"slices={slices}: must lie in 1..{len(data)}, the number of examples")
    if slices == 1:
        return [data]
    order = np.random.default_rng([seed, len(data)]).permutation(len(data))
    return [data.select(rows) for rows in np.array_split(order, slices)]
