"""`replace_ffn`: runs the feed-forward layers of a Hugging Face encoder on the fused op, in place, until undone.

Works on models whose layers are built like BERT's (BERT and MiniLM, RoBERTa, XLM-RoBERTa, ELECTRA, CamemBERT, ...):

    layer.feed_forward_chunk(a) = output.LayerNorm(a + output.dropout(output.dense(act(intermediate.dense(a)))))

It sets that one attribute on each layer; parameters, state dicts and optimizers stay as they are, and undoing deletes
it. A layer with adapters, hooks or replaced children (`kernels.readable`) runs its own code again, or with another
expression that expression in plain PyTorch, the children called. transformers is never imported (docs/decisions/0011).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels import readable
from kernels.ffn.called import Layers, called_ffn
from kernels.ffn.ops import fused_ffn
from kernels.language.expression import Expression, apply, linear, parse_expression
from kernels.language.expression import X as LEAF
from kernels.language.lowering import lower
from kernels.language.operators import OPERATORS, UNARY

_ATTRIBUTE = "feed_forward_chunk"

Layer = Any
"""A Hugging Face layer, known by what it has: `_mismatch` looks for everything that is read of it."""


@dataclass
class Replacement:
    """What `replace_ffn` did; a context manager that undoes it.

    Attributes:
        count: number of layers that run on the fused op.
        names: their module names.
        expressions: the expression of each.
    """

    count: int
    names: list[str]
    expressions: list[Expression]
    _layers: list[nn.Module] = field(repr=False)

    def undo(self) -> None:
        """Gives the layers back their own feed-forward code; does nothing the second time."""
        for layer in self._layers:
            layer.__dict__.pop(_ATTRIBUTE, None)
        self._layers = []

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def replace_ffn(
    model: nn.Module, expression: str | Expression | None = None, *, policy: str = "truncate"
) -> Replacement:
    """Runs every BERT-like feed-forward layer of `model` on the fused op. Parameters and state dict stay as they are.

    Args:
        model: a Hugging Face encoder, or any module that contains its layers.
        expression: None keeps each layer's own activation, `linear(act(linear(x,wb1)),wb2)`: outputs change by rounding
            only (`linear(gelu_erf(linear(x,wb1)),wb2)` for BERT's "gelu"). Another expression changes the function.
        policy: width policy of a given expression.

    Returns:
        A `Replacement`: `.count`, `.names`, `.undo()`, usable as `with replace_ffn(model): ...`. Calling `replace_ffn`
        on a model that has been replaced replaces it anew; `undo` of either brings the original code back.

    Raises:
        ValueError: no layer of `model` can be replaced; the message says what was looked for, and why near misses are
            not it.
        ExpressionError: the expression is not valid at the model's widths.
    """
    given = parse_expression(expression) if isinstance(expression, str) else expression
    found: list[tuple[str, Layer, Expression]] = []
    layer: Layer
    misses: list[str] = []
    for name, layer in model.named_modules():
        if not (hasattr(layer, "intermediate") and hasattr(layer, "output") and hasattr(type(layer), _ATTRIBUTE)):
            continue
        reason = _mismatch(layer)
        own = given
        if reason is None and own is None:
            own = _own_expression(layer)
            reason = "its activation is none of the operator table" if own is None else None
        if reason is not None or own is None:
            misses.append(f"{name or type(layer).__name__} ({type(layer).__name__}): {reason}")
            continue
        dense = layer.intermediate.dense
        lower(own, policy).check_widths(dense.in_features, dense.out_features)
        found.append((name, layer, own))
    if not found:
        raise ValueError(_nothing_found(model, misses))
    for _, layer, own in found:
        activation = layer.intermediate.intermediate_act_fn if given is None else None
        origin = _Origin(type(layer.intermediate), type(layer.output), activation)
        layer.__dict__[_ATTRIBUTE] = partial(_feed_forward, layer, own, policy, origin)
    return Replacement(len(found), [n for n, _, _ in found], [e for _, _, e in found], [m for _, m, _ in found])


class _Origin(NamedTuple):
    """What a layer was when it was replaced: the classes around its children, and its activation, which the expression
    stands for; None where it stands for another function."""

    intermediate: type[nn.Module]
    output: type[nn.Module]
    activation: Any


def _feed_forward(
    layer: Layer, expression: Expression, policy: str, origin: _Origin, attention_output: Tensor
) -> Tensor:
    """Stands in for `layer.feed_forward_chunk`; reads the parameters anew on every call."""
    x, parameters = attention_output, _read(layer, origin)
    if parameters is not None:
        dropout = layer.output.dropout
        p_drop = dropout.p if dropout.training else 0.0
        return fused_ffn(x, *parameters, expression, policy=policy, p_drop=p_drop, eps=layer.output.LayerNorm.eps)
    _note(layer, origin)
    if origin.activation is not None:
        return getattr(type(layer), _ATTRIBUTE)(layer, x)
    layers = Layers(layer.intermediate.dense, layer.output.dense)
    value = called_ffn(x, layers, expression, policy=policy)
    return layer.output.LayerNorm(x + layer.output.dropout(value)).to(x.dtype)


def _read(layer: Layer, origin: _Origin) -> tuple[Any, Any, Any, Any, Any, Any] | None:
    """The fused op's parameters; None where the layer's children must be called."""
    first, last, activation = layer.intermediate, layer.output, origin.activation
    if (type(first), type(last)) != (origin.intermediate, origin.output):
        return None
    if not (readable.is_untouched(first) and readable.is_untouched(last)):
        return None
    if activation is not None and first.intermediate_act_fn is not activation:
        return None
    if isinstance(activation, nn.Module) and not readable.is_untouched(activation):
        return None
    dense1, dense2, norm = first.dense, last.dense, last.LayerNorm
    if not readable.are_readable(dense1, dense2, norm, last.dropout):
        return None
    parameters = (dense1.weight, dense1.bias, dense2.weight, dense2.bias, norm.weight, norm.bias)
    return parameters if readable.are_tensors(*parameters) else None


def _note(layer: Layer, origin: _Origin) -> None:
    first, last = layer.intermediate, layer.output
    children = {f"intermediate__{n}": m for n, m in first.named_children() if n != "intermediate_act_fn"}
    children |= {f"output__{n}": m for n, m in last.named_children()}
    around = {"intermediate": first, "output": last, "intermediate__intermediate_act_fn": origin.activation}
    touched = {n: m for n, m in around.items() if isinstance(m, nn.Module) and not readable.is_untouched(m)}
    readable.note("a layer of replace_ffn", **touched, **children)


def _mismatch(layer: Layer) -> str | None:
    """Why a layer cannot be replaced, or None."""
    wanted: dict[str, type[nn.Module]] = {
        "intermediate.dense": nn.Linear,
        "output.dense": nn.Linear,
        "output.LayerNorm": nn.LayerNorm,
        "output.dropout": nn.Dropout,
    }
    for path, kind in wanted.items():
        owner, attribute = path.split(".")
        child = getattr(getattr(layer, owner), attribute, None)
        if type(child) is not kind:
            return f"{path} is {type(child).__name__}, not {kind.__name__}"
        if kind is not nn.Dropout and (child.weight is None or child.bias is None):
            return f"{path} has no weight or no bias"
    if not hasattr(layer.intermediate, "intermediate_act_fn"):
        return "intermediate.intermediate_act_fn is missing"
    for owner, known in (
        ("intermediate", {"dense", "intermediate_act_fn"}),
        ("output", {"dense", "LayerNorm", "dropout"}),
    ):
        extra = {name for name, _ in getattr(layer, owner).named_children()} - known
        if extra:
            return f"{owner} also has {', '.join(sorted(extra))}"
    return None


def _own_expression(layer: Layer) -> Expression | None:
    """The layer's own function, its activation recognized by its values on a probe; None if it is no operator."""
    probe = torch.linspace(-8.0, 8.0, 257, dtype=torch.float64)
    with torch.no_grad():
        value = layer.intermediate.intermediate_act_fn(probe)
        for name in UNARY:
            # float64 on both sides; the closest two operators (gelu, gelu_erf) are 5e-4 apart, and published
            # spellings of one function agree to the digits of their constants (1e-8)
            if torch.allclose(value, OPERATORS[name].forward(probe), rtol=0.0, atol=1e-6):
                return linear(apply(name, linear(LEAF, "wb1")), "wb2")
    return None


def _nothing_found(model: nn.Module, misses: list[str]) -> str:
    looked = "layers with intermediate.dense, output.dense, output.LayerNorm, output.dropout and feed_forward_chunk"
    detail = f"; near misses: {'; '.join(misses[:3])}" if misses else ""
    return f"no feed-forward layer of {type(model).__name__} can be replaced: looked for {looked}{detail}"
