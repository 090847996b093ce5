"""Which ways to save work give the same bits as a whole forward pass, found out by trying.

A classifier reads the last layer at the first token alone, so most of that layer need not be computed, and a stack can
be continued from a shorter one. All of it is exact in exact arithmetic; in floating point it is exact where a kernel
computes a row in the same way whatever rows stand beside it. That is a property of a library, a machine and a shape
(MKL's products have it, but one query alone goes another way than two), never of the data. So each shortcut is tried
once per shape, on seeded random input, against the whole computation, and taken only if every bit agrees.

Rejected: a table of libraries known to behave. It would be wrong on the next machine, silently.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine.student.attention import FFNASAttention, eager_attention
from engine.student.ffn import FFNPlan, FFNStack, ffn_weights
from kernels.ops import fused_ffn_stack

_VALUES = 4096
"""Values compared, at least: equal by chance is then out of the question."""
_QUERIES = (1, 2, 8, 32)
"""Numbers of leading queries to try. With one, libraries switch to products with a vector."""
_STACK_ROWS = 64
_KNOWN_ATTENTION = ("sdpa", "eager", None)


def run_ffns(stack: FFNStack, x: Tensor, plan: FFNPlan, begin: int, end: int) -> Tensor:
    """FFNs `begin` to `end` - 1 of a stack on [..., H], without dropout."""
    used = [stack[i] for i in range(begin, end)]
    return fused_ffn_stack(
        x,
        *ffn_weights(used, plan.inner),
        [ffn.layernorm.weight for ffn in used],
        [ffn.layernorm.bias for ffn in used],
        plan.program,
        eps=stack.eps,
    )


def attend_first(attention: FFNASAttention, x: Tensor, mask: Any, queries: int) -> Tensor:
    """[B, H], the attention block's output at the first token, from the first `queries` tokens' queries.

    Args:
        attention: the block, in eval mode.
        x: [B, S, H].
        mask: as `extended_mask` gives it, without a dimension of queries.
        queries: 1..S.
    """
    split = (len(x), -1, attention.query.out_features // attention.head_size, attention.head_size)
    query = attention.query(x[:, :queries]).view(split).transpose(1, 2)
    key = attention.key(x).view(split).transpose(1, 2)
    value = attention.value(x).view(split).transpose(1, 2)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention)
    context, _ = attend(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)
    first = context.reshape(len(x), queries, -1)[:, 0]
    return attention.layernorm(x[:, 0] + attention.dense(first))


class Shortcuts:
    """Answers by trial, each remembered; on one device, in one precision (autocast is the caller's)."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}

    def queries(self, attention: FFNASAttention, like: Tensor, mask: Any) -> int | None:
        """The fewest leading queries that `attend_first` may compute for input shaped like `like` [B, S, H].

        None where only the whole block gives the same bits.
        """
        if attention.config._attn_implementation not in _KNOWN_ATTENTION:
            return None

        def attempt(queries: int) -> bool:
            return _same(
                like.shape,
                like,
                lambda x: attention(x, mask)[0][:, 0],
                lambda x: attend_first(attention, x, mask, queries),
            )

        options = [n for n in _QUERIES if n <= like.shape[1]]
        key = ("queries", *like.shape, mask is None)
        return self._once(key, lambda: next((n for n in options if attempt(n)), None))

    def rows(self, stack: FFNStack, plan: FFNPlan, like: Tensor) -> bool:
        """Whether FFNs give the first token's rows [B, H] the bits they have among all rows of `like` [B, S, H]."""

        def attempt() -> bool:
            return _same(
                like.shape,
                like,
                lambda x: run_ffns(stack, x, plan, 0, 1)[:, 0],
                lambda x: run_ffns(stack, x[:, 0], plan, 0, 1),
            )

        return self._once(("rows", *like.shape, plan.program.digest, plan.inner, plan.kron), attempt)

    def continues(self, stack: FFNStack, plan: FFNPlan, like: Tensor) -> bool:
        """Whether a stack of two in one call is one and one more, bit for bit."""
        if plan.stack == 1:
            return True
        rows = like.shape[:-1].numel()  # all of them for Kronecker weights: how those are multiplied depends on it
        shape = (rows if plan.kron else min(_STACK_ROWS, rows), like.shape[-1])

        def attempt() -> bool:
            return _same(
                shape,
                like,
                lambda x: run_ffns(stack, x, plan, 0, 2),
                lambda x: run_ffns(stack, run_ffns(stack, x, plan, 0, 1), plan, 1, 2),
            )

        return self._once(("continues", *shape, plan.program.digest, plan.inner, plan.kron), attempt)

    def head(self, head: Callable[[Tensor], Tensor], like: Tensor) -> bool:
        """Whether the head gives [B, 1, H] the bits it gives [B, S, H]."""
        return self._once(
            ("head", *like.shape), lambda: _same(like.shape, like, head, lambda x: head(x[:, :1].contiguous()))
        )

    def _once(self, key: Hashable, find: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = find()
        return self._known[key]


def _same(
    shape: tuple[int, ...], like: Tensor, whole: Callable[[Tensor], Tensor], short: Callable[[Tensor], Tensor]
) -> bool:
    """Whether both give equal bits on seeded normal input, over at least `_VALUES` values."""
    generator = torch.Generator().manual_seed(0)
    compared = 0
    while compared < _VALUES:
        x = torch.randn(shape, generator=generator, dtype=torch.float32).to(like.device, like.dtype)
        expected = whole(x)
        if not torch.equal(expected, short(x)):
            return False
        compared += expected.numel()
    return True
