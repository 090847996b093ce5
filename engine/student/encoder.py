"""Encoder layers, and how an architecture becomes a plan for them.

A layer is an attention block and a stack of FFNs. A plan says per layer which program runs, in how many FFNs of the
stack, at which inner width; it is made and checked once per architecture, so a forward pass only follows it.
"""

from __future__ import annotations

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
    """Attention block and stack of FFNs; stores the stack and inner width of its plan."""

    def __init__(self, config: FFNASConfig, layer_idx: int, plan: FFNPlan) -> None:
        super().__init__()
        self.attention = FFNASAttention(config, layer_idx)
        self.all_ffn = FFNStack(config, plan)

    def forward(
        self, x: Tensor, attention_mask: Any, plan: FFNPlan, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Output [B, S, H], and what `FFNASAttention` returns beside it: queries, keys, probabilities, score loss."""
        x, *rest = self.attention(x, attention_mask, **kwargs)
        return self.all_ffn(x, plan), *rest

    def first(self, x: Tensor, attention_mask: Tensor | None, plan: FFNPlan) -> Tensor:
        """The first token's output [B, H] alone (`engine.student.first_token`)."""
        return self.all_ffn(attend_first(self.attention, x, attention_mask), plan)


class Planner:
    """Turns architectures into plans for one model, each checked once.

    Args:
        config: of the model whose stored weights the plans are for.
    """

    def __init__(self, config: FFNASConfig) -> None:
        self.config = config
        self.full = self._plan(config.full_architecture)
        self._cached = lru_cache(maxsize=_CACHED_PLANS)(self._checked_plan)

    def __call__(self, architecture: Architecture | None) -> tuple[FFNPlan, ...]:
        """The plan of `architecture`, None for everything stored.

        Raises:
            UserError: the architecture has another number of layers, needs more than is stored, or has an
                expression that is not valid at its width, or Kronecker weights in other places.
        """
        return self.full if architecture is None else self._cached(architecture)

    def __deepcopy__(self, memo: dict[int, Any]) -> Planner:
        return Planner(deepcopy(self.config, memo))  # the cache holds nothing that cannot be made again

    def __reduce__(self) -> tuple[type[Planner], tuple[FFNASConfig]]:
        return Planner, (self.config,)

    def _plan(self, architecture: Architecture) -> tuple[FFNPlan, ...]:
        check_architecture(self.config, architecture)
        policy, size = self.config.width_policy, self.config.intermediate_size
        return tuple(
            FFNPlan(lower(v.expression, policy), v.stack, inner_width(v.ratio, size), kron_weights(v.expression))
            for v in architecture.layers
        )

    def _checked_plan(self, architecture: Architecture) -> tuple[FFNPlan, ...]:
        plans = self._plan(architecture)
        for index, (plan, stored) in enumerate(zip(plans, self.full, strict=True)):
            for name, value, most in (("stack", plan.stack, stored.stack), ("inner width", plan.inner, stored.inner)):
                if value > most:
                    raise UserError(
                        f"layers[{index}]: {name} {value} is more than the {most} this model stores;"
                        " use a smaller one, or a supernet built with larger layers"
                    )
            if plan.kron != stored.kron:
                raise UserError(
                    f"layers[{index}]: Kronecker weights are {_names(plan.kron)}, those this model stores"
                    f" {_names(stored.kron)}; extract the architecture into a model of its own"
                )
        return plans


def _names(weights: frozenset[str]) -> str:
    return " and ".join(sorted(weights)) or "none"
