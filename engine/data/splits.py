"""Splitting without leaks: duplicates dropped first, held-out parts disjoint, stratified and seeded.

Two texts are the same when they differ only in case and white space: an uncased tokenizer cannot tell them apart. Of
exact duplicates one row stays; rows that are the same only up to case and spacing stay in training and are never held
out. So no text of a held-out part is in training in any spelling. Questions about one context, and choices after
one text, stay together.

Chosen: exact largest-remainder allocation per class. Rejected: scikit-learn's stratified split; it refuses classes
with one member, which user files have.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from engine.data.rows import Rows


def text_key(texts: Iterable[str]) -> tuple[str, ...]:
    """What makes two inputs the same text: case and white space aside."""
    return tuple(" ".join(text.casefold().split()) for text in texts)


def row_keys(rows: Rows) -> list[tuple[str, ...]]:
    """`text_key` of every row."""
    return [text_key(texts) for texts in zip(*rows.texts, strict=True)]


def drop_duplicates(rows: Rows, merged: Callable[[Sequence[Any]], Any]) -> tuple[Rows, int, int]:
    """One row per exact text (outer white space aside), the first one, with the group's label or gold.

    Args:
        rows: of one task.
        merged: the label (or gold) of several rows with one text, from theirs (`TaskHead.merged`).

    Returns:
        The rows, how many were dropped, and how many groups disagreed on the label.
    """
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, texts in enumerate(zip(*rows.texts, strict=True)):
        groups[tuple(text.strip() for text in texts)].append(i)
    kept = rows.take([members[0] for members in groups.values()])
    told = rows.golds if rows.labels is None else rows.labels.tolist()
    decided: dict[int, Any] = {}
    for position, members in enumerate(groups.values()):
        values = [told[m] for m in members] if told is not None and len(members) > 1 else []
        if len(set(values)) > 1:
            decided[position] = merged(values)
    if kept.labels is not None:
        labels = kept.labels.copy()
        for position, label in decided.items():
            labels[position] = label
        kept = replace(kept, labels=labels)
    elif kept.golds is not None:
        kept = replace(kept, golds=[decided.get(k, gold) for k, gold in enumerate(kept.golds)])
    return kept, len(rows) - len(kept), len(decided)


def without(rows: Rows, others: Sequence[Rows]) -> tuple[Rows, int]:
    """`rows` less those whose text is in one of `others`, and how many that were."""
    taken = {key for other in others for key in row_keys(other)}
    keep = [i for i, key in enumerate(row_keys(rows)) if key not in taken]
    return (rows if len(keep) == len(rows) else rows.take(keep)), len(rows) - len(keep)


def held_out_size(count: int, fraction: float, minimum: int, maximum: int) -> int:
    """Rows to hold out of `count`: the fraction, within [minimum, maximum], never more than a quarter, at least 1."""
    return max(1, min(max(round(count * fraction), minimum), maximum, count // 4))


def hold_out(
    rows: Rows, sizes: Sequence[int], seed: int, *, stratify: bool, last: bool = False
) -> tuple[Rows, list[Rows]]:
    """Cut parts of the given sizes out of `rows`.

    Args:
        rows: without exact duplicates.
        sizes: rows of each part.
        seed: decides which rows.
        stratify: keep the shares of the classes; every class keeps at least one row in the rest.
        last: cut from the end, the first part last, whatever the classes.

    Returns:
        The rest and the parts, each in the order of `rows`.
    """
    counts = Counter(row_keys(rows))
    free = np.array([counts[key] == 1 for key in row_keys(rows)])
    if last:
        ends, order = np.cumsum([0, *sizes]), np.flatnonzero(free)[::-1]
        chosen = [np.sort(order[a:b]) for a, b in pairwise(ends.tolist())]
        rest = np.setdiff1d(np.arange(len(rows)), np.concatenate(chosen))
        return rows.take(rest), [rows.take(part) for part in chosen]
    order = np.random.default_rng(seed).permutation(np.flatnonzero(free))
    strata = rows.labels[order] if stratify and rows.labels is not None else np.zeros(len(order), dtype=np.int64)
    pools = [order[strata == value] for value in np.unique(strata)]
    if stratify:
        pools = [pool[: len(pool) - 1] for pool in pools]
    parts = []
    for size in sizes:
        shares = allocate([len(pool) for pool in pools], size)
        parts.append(np.sort(np.concatenate([pool[:n] for pool, n in zip(pools, shares, strict=True)])))
        pools = [pool[n:] for pool, n in zip(pools, shares, strict=True)]
    rest = np.setdiff1d(np.arange(len(rows)), np.concatenate(parts))
    return rows.take(rest), [rows.take(part) for part in parts]


def hold_out_groups(
    rows: Rows, sizes: Sequence[int], seed: int, groups: Sequence[str], *, last: bool = False
) -> tuple[Rows, list[Rows]]:
    """Cut parts out of `rows` so that no group (rows of one context, say) is in two of them.

    Args:
        rows: without exact duplicates.
        sizes: rows of each part, reached by whole groups and so exceeded by less than one group.
        seed: decides which groups.
        groups: [N] the group of each row.
        last: take the last groups instead of random ones.

    Returns:
        The rest and the parts, each in the order of `rows`; a part is empty where the groups do not suffice.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    waiting = list(members.values())
    if not last:
        waiting = [waiting[i] for i in np.random.default_rng(seed).permutation(len(members))]
    parts = []
    for size in sizes:
        part: list[int] = []
        while len(part) < size and len(waiting) > 1:
            part += waiting.pop()
        parts.append(np.sort(np.array(part, dtype=np.int64)))
    rest = np.sort(np.array([row for group in waiting for row in group], dtype=np.int64))
    return rows.take(rest), [rows.take(part) for part in parts]


def allocate(counts: Sequence[int], size: int) -> list[int]:
    """`size` units shared in proportion to `counts` by largest remainder, none above its count."""
    total = sum(counts)
    size = min(size, total)
    exact = [size * count / total if total else 0.0 for count in counts]
    shares = [int(value) for value in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: size - sum(shares)]:
        shares[i] += 1
    return shares
