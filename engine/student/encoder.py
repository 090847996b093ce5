"""Encoder layers, and how an architecture becomes a plan for them.

A layer is an attention block and a stack of FFNs, and may lack either or both. A plan says per layer which program
runs, in how many FFNs of the stack, at which inner width, and with how many heads; it is made and checked once per
architecture, so a forward pass only follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from engine.architecture.architecture import Architecture
from engine.architecture.shape import inner_width
from engine.errors import UserError
from engine.student.attention import FFNASAttention
from engine.student.configuration import FFNASConfig, check_architecture
from engine.student.ffn import FFNPlan, FFNStack
from engine.student.first_token import attend_first
from kernels.language.expression import kron_weights
from kernels.language.lowering import lower

_CACHED_PLANS = 1024
"""Plans kept per model: a population step visits few architectures at a time."""


class FFNASLayer(nn.Module):
    """Attention block and stack of FFNs.

    Args:
        config: sizes.
        layer_idx: the layer's number.
        plan: the stack and inner width to store.
        heads: how many to store, None for all; with 0 `attention` is None.
    """

    def __init__(self, config: FFNASConfig, layer_idx: int, plan: FFNPlan, heads: int | None = None) -> None:
        super().__init__()
        self.attention = None if heads == 0 else FFNASAttention(config, layer_idx, heads)
        self.all_ffn = FFNStack(config, plan)

    @property
    def block(self) -> FFNASAttention:
        """The attention block of a layer that has one."""
        assert self.attention is not None
        return self.attention

    def forward(
        self, x: Tensor, attention_mask: Any, plan: FFNPlan, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Output [B, S, H], and what `FFNASAttention` returns beside it: queries, keys, probabilities, score loss (None
        where the plan has no heads)."""
        rest: list[Any] = [None] * 4
        if plan.heads != 0:
            leading = {} if plan.heads is None else {"heads": plan.heads}
            x, *rest = self.block(x, attention_mask, **leading, **kwargs)
        return (self.all_ffn(x, plan) if plan.stack else x), *rest

    def first(self, x: Tensor, attention_mask: Tensor | None, plan: FFNPlan) -> Tensor:
        """The first token's output [B, H] alone (`engine.student.first_token`)."""
        if plan.heads == 0 or self.attention is None:
            x = x[:, 0]
        else:
            x = attend_first(self.attention, x, attention_mask, plan.heads)
        return self.all_ffn(x, plan) if plan.stack else x

    def heads(self, plan: FFNPlan) -> int:
        """Attention heads that run under a plan."""
        if plan.heads is not None:
            return plan.heads
        return 0 if self.attention is None else self.attention.num_heads


class Planner:
    """Turns architectures into plans for one model, each checked once.

    Args:
        config: of the model whose stored weights the plans are for.

    Attributes:
        heads: attention heads that each layer stores.
        full: the plan of everything stored.
    """

    def __init__(self, config: FFNASConfig) -> None:
        self.config = config
        stored = self._plan(config.full_architecture)
        self.heads = tuple(int(plan.heads or 0) for plan in stored)
        self.full = tuple(plan._replace(heads=None if plan.heads else 0) for plan in stored)
        self._cached = lru_cache(maxsize=_CACHED_PLANS)(self._checked_plan)

    def __call__(self, architecture: Architecture | None) -> tuple[FFNPlan, ...]:
        """The plan of `architecture`, None for everything stored.

        Raises:
            UserError: the architecture has another number of layers, needs more than is stored, leaves out every
                layer, or has an expression that is not valid at its width, or Kronecker weights in other places.
        """
        return self.full if architecture is None else self._cached(architecture)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return Planner(deepcopy(self.config, memo))  # the cache holds nothing that cannot be made again

    def __reduce__(self) -> tuple[type[Planner], tuple[FFNASConfig]]:
        return Planner, (self.config,)

    def _plan(self, architecture: Architecture) -> tuple[FFNPlan, ...]:
        check_architecture(self.config, architecture)
        policy, size, heads = self.config.width_policy, self.config.intermediate_size, self.config.num_attention_heads
        return tuple(
            FFNPlan(
                lower(v.expression, policy),
                v.stack,
                inner_width(v.ratio, size) if v.stack else 0,
                kron_weights(v.expression),
                heads if v.heads is None else v.heads,
            )
            for v in architecture.layers
        )

    def _checked_plan(self, architecture: Architecture) -> tuple[FFNPlan, ...]:
        plans = self._plan(architecture)
        for index, (plan, stored, heads) in enumerate(zip(plans, self.full, self.heads, strict=True)):
            for name, value, most in (
                ("stack", plan.stack, stored.stack),
                ("inner width", plan.inner, stored.inner),
                ("number of heads", int(plan.heads or 0), heads),
            ):
                if value > most:
                    raise UserError(
                        f"layers[{index}]: {name} {value} is more than the {most} this model stores;"
                        " use a smaller one, or a supernet built with larger layers"
                    )
            if plan.stack and plan.kron != stored.kron:
                raise UserError(
                    f"layers[{index}]: Kronecker weights are {_names(plan.kron)}, those this model stores"
                    f" {_names(stored.kron)}; extract the architecture into a model of its own"
                )
        return tuple(
            plan._replace(heads=None) if plan.heads and plan.heads == heads else plan
            for plan, heads in zip(plans, self.heads, strict=True)
        )


def require_whole_layers(plans: Sequence[FFNPlan], what: str) -> None:
    """For work that knows attention blocks with all stored heads, and at least one FFN behind each.

    Args:
        plans: of one architecture.
        what: the work, for the message.

    Raises:
        UserError: a layer is left out, keeps some of the heads or none, or has no FFN.
    """
    for index, plan in enumerate(plans):
        if plan.heads is not None or plan.stack == 0:
            raise UserError(
                f"layers[{index}]: {what} takes layers with all their heads and an FFN, and this one has fewer"
                " heads, no FFN, or is left out; run the architecture by itself, or extract it"
            )


def _names(weights: frozenset[str]) -> str:
    return " and ".join(sorted(weights)) or "none"
