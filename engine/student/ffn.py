"""The stack of FFNs of one layer, run at any stored or smaller shape.

The weights of a layer are stored once, at its largest stack and inner width; a subnet runs the first n FFNs with the
first d rows of `dense1` and the first d columns of `dense2`, as views. A weight that is a Kronecker product is stored
as its factors, and the views are of the leading rows (columns) of the larger one (`kernels.language.kron_shape`).

Rejected: copying the slices into smaller modules per candidate, which costs memory and a second gradient buffer for
every subnet, and unshares the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from engine.errors import UserError
from engine.student.configuration import FFNASConfig
from kernels import readable
from kernels.ffn.called import Layers, called_ffn
from kernels.ffn.kron import KronWeight, Weight
from kernels.ffn.modules import KronLinear, dense_layers
from kernels.ffn.ops import fused_ffn_stack
from kernels.language.program import Program


class FFNPlan(NamedTuple):
    """How one layer runs: its FFNs' lowered expression, how many of the stack, their inner width, and which weights are
    Kronecker products; and how many of the stored attention heads, the leading ones: None for all, 0 for no attention
    block."""

    program: Program
    stack: int
    inner: int
    kron: frozenset[str] = frozenset()
    heads: int | None = None

    @property
    def skipped(self) -> bool:
        """Whether the layer hands on its input."""
        return self.stack == 0 and self.heads == 0


class FFN(nn.Module):
    """Weights of one FFN, `LayerNorm(x + dropout(expression(x)))`: `dense1` [d, H], `dense2` [H, d], `layernorm`.

    Its parameters are read for the fused op of a stack (`ffn_weights`); what is more than they are (adapters, hooks:
    `kernels.readable`) is called.
    """

    def __init__(self, config: FFNASConfig, plan: FFNPlan) -> None:
        super().__init__()
        self.dense1, self.dense2 = dense_layers(plan.kron, config.hidden_size, plan.inner, config.shape.block)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, plan: FFNPlan, p_drop: float = 0.0) -> Tensor:
        """[..., H] to [..., H] at the stored inner width, in plain PyTorch; `plan` gives the expression."""
        program, expression = plan.program, plan.program.expression
        assert expression is not None  # plans are made of expressions
        layers = Layers(self.dense1, self.dense2, self.layernorm)
        return called_ffn(x, layers, expression, policy=program.policy, p_drop=p_drop)


def may_read(ffns: Sequence[FFN], inner: int, work: str | None = None) -> bool:
    """Whether `ffn_weights` of these FFNs at inner width `inner` say all there is to them; else they are to be called.

    Args:
        ffns: of one layer.
        inner: the width they are to run at.
        work: names what cannot call them; None where it can, unless it wants slices of them.

    Raises:
        UserError: there is more to them than parameters, and they cannot be called.
    """
    for ffn in ffns:
        parts = (ffn.dense1, ffn.dense2, ffn.layernorm)
        cut = work is not None or getattr(ffn.dense1, "out_features", inner) != inner
        plain = readable.is_untouched(ffn) and readable.are_readable(*parts, everywhere=not cut)
        if plain and readable.are_tensors(*(getattr(part, name) for part in parts for name in ("weight", "bias"))):
            continue
        if cut:
            kinds = ", ".join(f"{name} {type(part).__name__}" for name, part in ffn.named_children())
            raise UserError(
                f"all_ffn: {work or 'a subnet of narrower FFNs'} takes plain linear layers, and those of an FFN have"
                f" adapters, hooks, or another class ({kinds}); merge or remove them, or extract the architecture first"
            )
        whole = {} if readable.is_untouched(ffn) else {"FFN": ffn}
        readable.note("an FFN", **whole, dense1=parts[0], dense2=parts[1], layernorm=parts[2])
        return False
    return True


def ffn_weights(ffns: Sequence[FFN], inner: int) -> tuple[list[Weight], list[Tensor], list[Weight], list[Tensor]]:
    """w1 [d, H], b1 [d], w2 [H, d] and b2 [H] of FFNs at inner width d, as views; Kronecker products as factors."""
    if not ffns:
        return [], [], [], []
    full = ffns[0].dense1.out_features == inner  # slicing to the full width would still cost a copy of the gradient
    return (
        [f.dense1.weight if full else _rows(f.dense1, inner) for f in ffns],
        [f.dense1.bias if full else f.dense1.bias[:inner] for f in ffns],
        [f.dense2.weight if full else _columns(f.dense2, inner) for f in ffns],
        [f.dense2.bias for f in ffns],
    )


def _rows(dense: nn.Linear | KronLinear, count: int) -> Weight:
    if isinstance(dense, KronLinear):
        return KronWeight(dense.a[: count // len(dense.b)], dense.b)
    return dense.weight[:count]


def _columns(dense: nn.Linear | KronLinear, count: int) -> Weight:
    if isinstance(dense, KronLinear):
        return KronWeight(dense.a[:, : count // dense.b.shape[1]], dense.b)
    return dense.weight[:, :count]


class FFNStack(nn.ModuleList):
    """The FFNs of one layer, one after the other, in one call of the fused op.

    Args:
        config: sizes, dropout and LayerNorm epsilon.
        plan: the stack and inner width to store.
    """

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator[FFN]: ...
        def __getitem__(self, index: int) -> FFN: ...  # type: ignore[override]

    def __init__(self, config: FFNASConfig, plan: FFNPlan) -> None:
        super().__init__(FFN(config, plan) for _ in range(plan.stack))
        self.p_drop = float(config.hidden_dropout_prob)
        self.eps = config.layer_norm_eps

    def forward(self, x: Tensor, plan: FFNPlan) -> Tensor:
        """[..., H] to [..., H] through the first `plan.stack` FFNs at inner width `plan.inner`."""
        if plan.stack == 0:
            return x
        return self.part(x, plan, 0, plan.stack, self.p_drop if self.training else 0.0)

    def part(self, x: Tensor, plan: FFNPlan, begin: int, end: int, p_drop: float = 0.0) -> Tensor:
        """[..., H] to [..., H] through FFNs `begin` to `end` - 1 at inner width `plan.inner`."""
        used = list(islice(self, begin, end))
        if not may_read(used, plan.inner):
            for ffn in used:
                x = ffn(x, plan, p_drop)
            return x
        return fused_ffn_stack(
            x,
            *ffn_weights(used, plan.inner),
            [ffn.layernorm.weight for ffn in used],
            [ffn.layernorm.bias for ffn in used],
            plan.program,
            p_drop=p_drop,
            eps=self.eps,
        )
