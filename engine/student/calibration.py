"""What a standard model computes inside its layers on a few texts, and what follows: an order, and a least-squares fit.

The inherited student (`search.inherit`) keeps the leading neurons and heads of its teacher's layers. So:

    calibrate   sums over real tokens, per layer: Gram matrices of the FFN's inner values a and of the heads' outputs c
    reorder     neurons and heads by importance, the most important first; the model computes the same as before
    refit       the second product (the output projection of attention) for the leading part alone:
                W', b' = argmin  sum over tokens |W' a_leading + b' - (W a + b)|^2 + ridge |W' - W_leading|^2

Importance of neuron j is rms(a_j) |W2[:, j]|; of head h the root mean square of W_o[:, h] c_h. Sources: Wanda (Sun et
al., ICLR 2024) over whole neurons; Kwon et al. (NeurIPS 2022) and K-prune (Park et al., ICLR 2024) for the fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.data import Batch
from engine.student.ffn import FFN
from engine.student.modeling import FFNASModel, FFNASPreTrainedModel
from kernels.language.expression import Expression
from kernels.reference.ffn import evaluate_subtree

KEPT = 4096
"""Tokens whose FFN inputs are kept, for expressions other than the teacher's."""

RIDGE = 1e-2
"""Of the least-squares fits, in units of the mean square of an inner value."""


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over the calibration tokens of one layer, divided by their number.

    Attributes:
        inner: float64 [F + 1, F + 1], Gram matrix of the FFN's inner values and a one.
        context: float64 [H + 1, H + 1], Gram matrix of the heads' outputs, side by side, and a one.
        inputs: [T, H], what the FFN is given at the first `KEPT` tokens.
    """

    inner: Tensor
    context: Tensor
    inputs: Tensor


@torch.no_grad()
def calibrate(model: FFNASPreTrainedModel, batches: Iterable[Batch]) -> list[LayerStatistics]:
    """Statistics of every layer of `model`, which has one FFN per layer, over the real tokens of `batches`.

    The model is run in eval mode, in float32, and left in it.
    """
    base = model.base_model.eval()
    layers = base.config.full_architecture.layers
    sums: list[list[Tensor]] = []
    for layer in base.encoder:
        inner, hidden = layer.all_ffn[0].dense1.out_features, layer.block.dense.in_features
        sums.append([torch.zeros(n + 1, n + 1, dtype=torch.float64) for n in (inner, hidden)])
    inputs: list[list[Tensor]] = [[] for _ in sums]
    tokens = 0
    device = next(base.parameters()).device
    for batch in batches:
        moved = batch.to(device)
        ids, mask, types = (t.flatten(0, -2) for t in (moved.input_ids, moved.mask, moved.token_type_ids))
        with _watched(base) as seen:
            base(ids, attention_mask=mask, token_type_ids=types, return_dict=True)
        for index, layer in enumerate(base.encoder):
            context, entered = seen[index]
            values = inner_values(layer.all_ffn[0], layers[index].expression, entered[mask])
            for total, rows in zip(sums[index], (values, context[mask]), strict=True):
                total += _gram(rows)
            if tokens < KEPT:
                inputs[index].append(entered[mask])
        tokens += int(mask.sum())
    if not tokens:
        raise ValueError("calibrate: the batches hold no tokens")
    return [
        LayerStatistics(inner / tokens, context / tokens, torch.cat(rows)[:KEPT])
        for (inner, context), rows in zip(sums, inputs, strict=True)
    ]


def inner_values(ffn: FFN, expression: Expression, rows: Tensor) -> Tensor:
    """What `wb2` multiplies: [T, d] of an FFN for inputs [T, H]; the expression's root is its second product."""
    if expression.weight != "wb2":
        raise ValueError(f"inner_values: the root of {expression} is not the second product")
    weights: dict[str, Any] = {
        "wb1": (ffn.dense1.weight, ffn.dense1.bias),
        "wb2": (ffn.dense2.weight, ffn.dense2.bias),
    }
    return evaluate_subtree(expression.args[0], rows, weights)


def _gram(rows: Tensor) -> Tensor:
    rows = torch.cat([rows.float(), rows.new_ones(len(rows), 1, dtype=torch.float32)], dim=1)
    return (rows.T @ rows).double().cpu()


@contextmanager
def _watched(base: FFNASModel) -> Iterator[dict[int, list[Tensor]]]:
    """Per layer the heads' outputs and the input of the FFN, [B, S, H] each, of the forward pass inside."""
    seen: dict[int, list[Tensor]] = {}
    handles = []
    for index, layer in enumerate(base.encoder):
        own: list[Tensor] = []
        seen[index] = own

        def context(_: nn.Module, inputs: tuple[Any, ...], __: Any, own: list[Tensor] = own) -> None:
            own.append(inputs[0].detach())

        def entered(_: nn.Module, __: tuple[Any, ...], output: tuple[Any, ...], own: list[Tensor] = own) -> None:
            own.append(output[0].detach())

        handles += [
            layer.block.dense.register_forward_hook(context),
            layer.block.register_forward_hook(entered),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def reorder(model: FFNASPreTrainedModel, statistics: list[LayerStatistics]) -> list[LayerStatistics]:
    """Sorts neurons and heads of every layer by importance, in place; returns the statistics in the new order.

    The model's outputs stay the same, up to the order in which sums are rounded.
    """
    ordered = []
    for layer, found in zip(model.base_model.encoder, statistics, strict=True):
        ffn: Any = layer.all_ffn[0]  # of full weights, which a type cannot tell
        attention = layer.block
        importance = found.inner.diagonal()[:-1].sqrt() * ffn.dense2.weight.double().cpu().norm(dim=0)
        neurons = importance.argsort(descending=True, stable=True)
        size = attention.head_size
        strength = _head_importance(attention.dense.weight.double().cpu(), found.context, size)
        heads = strength.argsort(descending=True, stable=True)
        rows = (heads[:, None] * size + torch.arange(size)).flatten()
        for parameter, order, axis in (
            (ffn.dense1.weight, neurons, 0),
            (ffn.dense1.bias, neurons, 0),
            (ffn.dense2.weight, neurons, 1),
            *((m.weight, rows, 0) for m in (attention.query, attention.key, attention.value)),
            *((m.bias, rows, 0) for m in (attention.query, attention.key, attention.value)),
            (attention.dense.weight, rows, 1),
        ):
            parameter.copy_(parameter.index_select(axis, order.to(parameter.device)))
        ordered.append(replace(found, inner=_permuted(found.inner, neurons), context=_permuted(found.context, rows)))
    return ordered


def _head_importance(weight: Tensor, gram: Tensor, size: int) -> Tensor:
    """Root mean square of W[:, h] c_h for every head h."""
    shares = []
    for start in range(0, weight.shape[1], size):
        own = weight[:, start : start + size]
        shares.append((own @ gram[start : start + size, start : start + size] * own).sum())
    return torch.stack(shares).clamp(min=0).sqrt()


def _permuted(gram: Tensor, order: Tensor) -> Tensor:
    order = torch.cat([order, torch.tensor([len(gram) - 1])])
    return gram[order][:, order]


def refit(gram: Tensor, weight: Tensor, bias: Tensor, width: int, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Weight [outputs, width] and bias for the leading `width` inputs, closest to the whole product.

    Args:
        gram: [inputs + 1, inputs + 1], mean Gram matrix of the inputs and a one.
        weight, bias: [outputs, inputs] and [outputs], of the whole product.
        width: 1..inputs.
        ridge: pull towards the whole product's own leading columns, in units of the mean square of an input.
    """
    inputs = weight.shape[1]
    whole = torch.cat([weight.detach().cpu().double(), bias.detach().cpu().double()[:, None]], dim=1)
    kept = torch.cat([torch.arange(width), torch.tensor([inputs])])
    pull = ridge * gram.diagonal()[:-1].mean() + 1e-12
    left = gram[kept][:, kept].clone()
    left.diagonal()[:-1].add_(pull)
    right = gram[kept] @ whole.T
    right[:-1] += pull * whole[:, :width].T
    solved = torch.linalg.solve(left, right).T
    fitted = solved.to(weight.dtype).to(weight.device)
    return fitted[:, :-1].contiguous(), fitted[:, -1].contiguous()


@torch.no_grad()
def fit_inner(
    ffn: FFN, expression: Expression, source: FFN, original: Expression, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Second product of `ffn` with another expression, closest to what `source` computes for these inputs.

    Args:
        ffn: with its first product set, inner width d.
        expression: its own.
        source: the teacher's FFN, with the expression `original`.
        inputs: [T, H].

    Returns:
        Weight [H, d] and bias [H].
    """
    values = inner_values(ffn, expression, inputs)
    wanted = source.dense2(inner_values(source, original, inputs))
    ones = torch.cat([values, values.new_ones(len(values), 1)], dim=1).double()
    left = ones.T @ ones
    left.diagonal()[:-1].add_(RIDGE * left.diagonal()[:-1].mean() + 1e-12)
    solved = torch.linalg.solve(left, ones.T @ wanted.double()).T.to(inputs.dtype)
    return solved[:, :-1].contiguous(), solved[:, -1].contiguous()
