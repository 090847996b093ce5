"""Architectures as a trie over layers: which work candidates of one supernet have in common.

A node is a distinct *prefix*: the choices of the first `depth` layers. Below a node, layers that run the same program
at the same inner width share a *branch*, for they differ only in how far they go down one stack: the FFNs of stack n
are the first n of stack n + 1. So a trie says which attention blocks (one per inner node) and which FFNs (one per step
of every branch) a set of candidates needs, each of them once.

Programs are compared by content; expressions with one canonical form share one (`kernels.language.lowering`).

Rejected: grouping by the expression's text. `add(x, a)` and `add(a, x)` lower to one program and are one branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.student.ffn import FFNPlan

Plans = tuple[FFNPlan, ...]
"""One plan per layer, as `engine.student.encoder.Planner` makes them."""


class Choice(NamedTuple):
    """One layer's choice, as a value: equal choices run the same FFNs.

    Attributes:
        digest: content of the program.
        inner: inner width.
        stack: FFNs.
    """

    digest: bytes
    inner: int
    stack: int


@dataclass(eq=False)
class Branch:
    """What one layer may run at one inner width below a node.

    Attributes:
        plan: program, deepest stack asked for, and inner width.
        stacks: the node behind each stack that some candidate has, in rising order.
    """

    plan: FFNPlan
    stacks: dict[int, Node] = field(default_factory=dict)


@dataclass(eq=False)
class Node:
    """A distinct prefix.

    Attributes:
        prefix: the layers' choices; its length is the node's depth.
        parent, branch: where the node hangs; None at the root.
        stack: FFNs of the last layer of the prefix; 0 at the root.
        branches: by (program, inner width), in order of first appearance.
        candidates: positions of the candidates that end here; empty above the last layer.
    """

    prefix: tuple[Choice, ...] = ()
    parent: Node | None = None
    branch: Branch | None = None
    stack: int = 0
    branches: dict[tuple[bytes, int], Branch] = field(default_factory=dict)
    candidates: list[int] = field(default_factory=list)

    @property
    def depth(self) -> int:
        """Layers behind this node."""
        return len(self.prefix)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, depth first."""
        yield self
        for branch in self.branches.values():
            for child in branch.stacks.values():
                yield from child.walk()


class Work(NamedTuple):
    """Attention blocks and FFNs that run, embeddings and heads not counted."""

    attentions: int
    ffns: int


def build_trie(plans: Sequence[Plans]) -> Node:
    """The trie of candidates, all of one model; equal candidates end at one node."""
    root = Node()
    for position, candidate in enumerate(plans):
        node = root
        for plan in candidate:
            node = _descend(node, plan)
        node.candidates.append(position)
    for node in list(root.walk()):
        for branch in node.branches.values():
            branch.stacks = dict(sorted(branch.stacks.items()))
    return root


def work_shared(root: Node) -> Work:
    """What the trie computes: an attention block per inner node, an FFN per step of every branch."""
    branches = [branch for node in root.walk() for branch in node.branches.values()]
    attentions = sum(1 for node in root.walk() if node.branches)
    return Work(attentions, sum(branch.plan.stack for branch in branches))


def work_apart(plans: Sequence[Plans]) -> Work:
    """What the candidates compute one by one."""
    return Work(sum(map(len, plans)), sum(plan.stack for candidate in plans for plan in candidate))


def _descend(node: Node, plan: FFNPlan) -> Node:
    key = (plan.program.digest, plan.inner)
    branch = node.branches.get(key)
    if branch is None:
        branch = node.branches[key] = Branch(plan)
    elif plan.stack > branch.plan.stack:
        branch.plan = plan
    child = branch.stacks.get(plan.stack)
    if child is None:
        prefix = (*node.prefix, Choice(*key, plan.stack))
        child = branch.stacks[plan.stack] = Node(prefix, node, branch, plan.stack)
    return child
