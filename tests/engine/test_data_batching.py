"""Batches: every row once, order decided by (seed, epoch), contents equal to padding row by row."""

import numpy as np
import pytest
import torch
from data_toys import dataset

from engine.data import Batch, plan_batches


def lengths_of(count, seed=0):
    return np.random.default_rng(seed).integers(1, 60, count)


def rows_of(batches):
    return [int(i) for batch in batches for i in batch]


SIZES = [{"batch_size": 7}, {"batch_size": 1}, {"batch_size": 500}, {"max_tokens": 100}, {"max_tokens": 1}]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 135, 541])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("bucket", [True, False])
def test_every_row_comes_exactly_once(size, count, shuffle, bucket):
    plan = plan_batches(lengths_of(count), seed=3, epoch=1, shuffle=shuffle, bucket=bucket, **size)
    assert sorted(rows_of(plan)) == list(range(count))
    if "batch_size" in size:
        assert sorted(map(len, plan), reverse=True)[:-1] == [size["batch_size"]] * (len(plan) - 1)


def test_seed_and_epoch_decide_the_order():
    lengths = lengths_of(300)

    def order(seed, epoch):
        return rows_of(plan_batches(lengths, batch_size=8, seed=seed, epoch=epoch))

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(s, e)) for s, e in [(1, 2), (1, 3), (2, 2), (2, 1), (0, 3)]}) == 5


def test_order_does_not_depend_on_the_global_generators():
    lengths = lengths_of(100)
    first = rows_of(plan_batches(lengths, batch_size=8, seed=1))
    np.random.seed(5)
    torch.manual_seed(5)
    assert rows_of(plan_batches(lengths, batch_size=8, seed=1)) == first


def test_max_tokens_bounds_padded_size():
    lengths = lengths_of(541)
    for multiple in (1, 8):
        plan = plan_batches(lengths, max_tokens=256, seed=1, pad_to_multiple=multiple)
        for rows in plan:
            width = -(-lengths[rows].max() // multiple) * multiple
            assert len(rows) * width <= 256 or len(rows) == 1


def test_bucketing_saves_padding_and_keeps_batches_in_random_order():
    lengths = lengths_of(2000)

    def padded(**options):
        return [len(rows) * lengths[rows].max() for rows in plan_batches(lengths, batch_size=16, seed=1, **options)]

    plain, bucketed = sum(padded(bucket=False)), sum(padded(bucket=True))
    assert bucketed < 1.1 * lengths.sum() < plain
    widths = [lengths[rows].max() for rows in plan_batches(lengths, batch_size=16, seed=1)]
    # a sorted sequence has rank correlation 1 with its position; 125 shuffled ones stay well within 0.5
    assert abs(np.corrcoef(np.arange(len(widths)), widths)[0, 1]) < 0.5


def test_without_shuffling_rows_keep_their_order_or_are_sorted_by_length():
    lengths = lengths_of(100)
    assert rows_of(plan_batches(lengths, batch_size=8, shuffle=False, bucket=False)) == list(range(100))
    order = rows_of(plan_batches(lengths, batch_size=8, shuffle=False, bucket=True))
    assert order == sorted(range(100), key=lambda i: (lengths[i], i))


def test_drop_last_leaves_only_full_batches():
    plan = plan_batches(lengths_of(45), batch_size=7, drop_last=True)
    assert [len(rows) for rows in plan] == [7] * 6
    assert plan_batches(lengths_of(5), batch_size=7, drop_last=True) == []


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "max_tokens": 4}, {"batch_size": 0}, {"max_tokens": -1}])
def test_wrong_sizes_are_refused(options):
    with pytest.raises(ValueError):
        plan_batches(lengths_of(5), **options)


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("labels", [True, False])
def test_batch_equals_padding_row_by_row(multiple, labels):
    lengths = [3, 1, 7, 5, 2]
    data = dataset(lengths, labels=labels)
    rows = [4, 0, 2]
    batch = data.collate(rows, pad_to_multiple=multiple)
    width = 7 if multiple == 1 else 8
    assert batch.input_ids.shape == (3, width)
    for line, row in enumerate(rows):
        n = lengths[row]
        assert batch.input_ids[line].tolist() == [row + 10] * n + [3] * (width - n)
        assert batch.attention_mask[line].tolist() == [True] * n + [False] * (width - n)
        assert batch.token_type_ids[line].tolist() == [0] * (n // 2) + [1] * (n - n // 2) + [0] * (width - n)
    assert (batch.input_ids.dtype, batch.token_type_ids.dtype) == (torch.int64, torch.int64)
    assert batch.attention_mask.dtype == torch.bool
    assert batch.num_tokens == 12
    assert len(batch) == 3
    assert (batch.labels is None) if not labels else (batch.labels.tolist() == rows)


@pytest.mark.parametrize("size", [{"batch_size": 7}, {"max_tokens": 64}], ids=str)
def test_start_step_resumes_at_the_exact_batch(size):
    data = dataset(lengths_of(100).tolist())
    whole = [b.input_ids for b in data.batches(seed=1, epoch=4, **size)]
    for step in (0, 1, len(whole) - 1, len(whole), len(whole) + 3):
        rest = [b.input_ids for b in data.batches(seed=1, epoch=4, start_step=step, **size)]
        assert len(rest) == max(0, len(whole) - step)
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))


@pytest.mark.parametrize("size", [{"batch_size": 7}, {"batch_size": 100}, {"max_tokens": 64}], ids=str)
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("count", [1, 99, 100])
def test_num_batches_counts_them(size, drop_last, count):
    data = dataset(lengths_of(count).tolist())
    options = dict(seed=2, epoch=1, drop_last=drop_last, **size)
    assert data.num_batches(**options) == len(list(data.batches(**options)))


def test_batch_moves_to_a_device():
    batch = dataset([2, 3]).collate([0, 1]).to("meta")
    assert isinstance(batch, Batch)
    assert {t.device.type for t in (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels)} == {
        "meta"
    }
    assert dataset([2, 3], labels=False).collate([0]).to("cpu").labels is None
