"""Splitting: disjoint, stratified, seeded, and without a text on both sides in any spelling."""

from collections import Counter

import numpy as np
import pytest

from engine.data import Rows
from engine.data.splits import allocate, drop_duplicates, held_out_size, hold_out, row_keys, text_key, without
from engine.data.tags import UNTAGGED, Tags
from engine.data.task import head_of


def numbered(count, labels):
    return Rows(([f"text {i}" for i in range(count)],), np.asarray(labels))


def test_duplicates_keep_the_first_row_and_the_most_frequent_label():
    rows = Rows((["a", "b", " a", "a", "B", "c"],), np.array([0, 1, 1, 1, 0, 2]))
    kept, dropped, conflicts = drop_duplicates(rows, head_of("classification").merged)
    assert kept.texts[0] == ["a", "b", "B", "c"]
    assert kept.labels.tolist() == [1, 1, 0, 2]
    assert (dropped, conflicts) == (2, 1)
    tied, _, _ = drop_duplicates(Rows((["a", "a"],), np.array([1, 0])), head_of("classification").merged)
    assert tied.labels.tolist() == [1]


def test_duplicate_pairs_agree_in_both_texts_and_average_their_targets():
    rows = Rows((["a", "a", "a"], ["x", "y", "x"]), np.array([1.0, 2.0, 4.0], dtype=np.float32))
    kept, dropped, conflicts = drop_duplicates(rows, head_of("regression").merged)
    assert kept.texts == (["a", "a"], ["x", "y"])
    assert kept.labels.tolist() == [2.5, 2.0]
    assert kept.labels.dtype == np.float32
    assert (dropped, conflicts) == (1, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_complete_and_stratified(seed):
    labels = np.repeat([0, 1, 2], [300, 200, 41])
    rows = numbered(541, labels)
    rest, parts = hold_out(rows, [54, 27, 100], seed, stratify=True)
    everything = [rest, *parts]
    assert [len(p) for p in parts] == [54, 27, 100]
    assert sorted(t for p in everything for t in p.texts[0]) == sorted(rows.texts[0])
    for part in everything:
        for label, share in Counter(labels.tolist()).items():
            # proportional up to the rounding of one row, and the row of each class that is kept back
            assert abs(np.sum(part.labels == label) - len(part) * share / 541) <= 2
        assert part.labels.tolist() == [labels[int(t.split()[1])] for t in part.texts[0]]


def test_seed_decides_the_parts():
    rows = numbered(100, np.arange(100) % 2)
    texts = [hold_out(rows, [20], seed, stratify=True)[1][0].texts[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_every_class_stays_in_the_rest():
    rest, parts = hold_out(numbered(20, [0] * 17 + [1, 1, 2]), [5, 4], 0, stratify=True)
    assert set(rest.labels.tolist()) == {0, 1, 2}
    assert all(2 not in part.labels for part in parts)


def test_regression_is_cut_at_random():
    rows = numbered(45, np.linspace(0, 1, 45, dtype=np.float32))
    rest, (a, b) = hold_out(rows, [7, 5], 0, stratify=False)
    assert (len(rest), len(a), len(b)) == (33, 7, 5)


def test_other_spellings_of_a_text_are_never_held_out():
    texts = [f"Text {i}" for i in range(40)] + [f"text  {i}" for i in range(20)]
    rows = Rows((texts,), np.arange(60) % 2)
    rest, parts = hold_out(rows, [12, 8], 0, stratify=True)
    held = {key for part in parts for key in row_keys(part)}
    assert len(held) == 18  # 20 rows have one spelling, and one of each class is kept back
    assert not held & set(row_keys(rest))


def test_without_drops_rows_in_any_spelling():
    rows = Rows((["The cat", "dog", "bird"],))
    kept, count = without(rows, [Rows((["the  CAT "],)), Rows((["fish"],))])
    assert (kept.texts[0], count) == (["dog", "bird"], 1)
    assert without(rows, [Rows((["fish"],))]) == (rows, 0)
    assert text_key(["A  b", "C"]) == ("a b", "c")


@pytest.mark.parametrize(
    ("count", "size"), [(10_000, 1000), (100_000, 2000), (500, 64), (200, 50), (12, 3), (4, 1), (1, 1)]
)
def test_held_out_sizes_stay_in_their_limits(count, size):
    assert held_out_size(count, 0.1, 64, 2000) == size


@pytest.mark.parametrize("size", [0, 1, 7, 45, 1000])
def test_allocation_is_proportional_and_exact(size):
    counts = [1, 7, 45, 0, 135]
    shares = allocate(counts, size)
    assert sum(shares) == min(size, 188)
    assert all(0 <= s <= c for s, c in zip(shares, counts, strict=True))
    assert all(abs(s - min(size, 188) * c / 188) < 1 for s, c in zip(shares, counts, strict=True))
    assert allocate([0, 0], 3) == [0, 0]


def test_rows_check_their_columns():
    with pytest.raises(ValueError, match="unequal length"):
        Rows((["a"], ["b", "c"]))
    rows = numbered(45, np.arange(45))
    sample = rows.sample(7, seed=1)
    assert sample.labels.tolist() == sorted(sample.labels.tolist()) == rows.sample(7, seed=1).labels.tolist()
    assert rows.sample(None, 0) is rows
    assert rows.sample(45, 0) is rows


def test_duplicate_sentences_keep_their_tags():
    """The text says one thing, its tags another: none of them is dropped without being counted."""
    none, first, second = Tags((UNTAGGED, UNTAGGED)), Tags((0, 1)), Tags((0, 0))
    rows = Rows(
        (["a b", "c d", "a b", "c d", "c d", "e f", "e f"],), golds=[none, first, second, second, second, first, first]
    )
    kept, dropped, conflicts = drop_duplicates(rows, head_of("tokens").merged)
    assert kept.texts == (["a b", "c d", "e f"],)
    assert kept.golds == [second, second, first]
    assert (dropped, conflicts) == (4, 2)
