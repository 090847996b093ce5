"""Cutting a step's batch: every row once, shares that add up, and means of parts that make the mean of the whole."""

import pytest
import torch

from engine.data import Batch
from engine.data.parts import split
from engine.data.prefetch import prefetch

LENGTHS = [1, 2, 2, 5, 6, 6, 9]


@pytest.fixture
def batch() -> Batch:
    mask = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    ids = torch.arange(63).reshape(7, 9) * mask
    return Batch(ids, mask, torch.zeros_like(ids), torch.arange(7.0))


def all_parts(batch, ranks, micro):
    return [split(batch, rank=rank, ranks=ranks, micro_batches=micro) for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (7, 1), (1, 9), (4, 3)])
def test_every_row_is_in_one_part_and_shares_add_up(batch, ranks, micro):
    cut = all_parts(batch, ranks, micro)
    parts = [part for of_rank in cut for part in of_rank if part.rows > 0]
    labels = torch.cat([part.batch.labels for part in parts])
    assert sorted(labels.tolist()) == list(range(7))
    for share in ("tokens", "pairs", "rows"):
        assert sum(getattr(part, share) for part in parts) == pytest.approx(1.0, rel=1e-12)
    for of_rank in cut:
        assert [part.last for part in of_rank] == [False] * (len(of_rank) - 1) + [True]
        assert [part.batch.part for part in of_rank] == list(range(len(of_rank)))
        assert all(part.batch.input_ids.shape[1] == 9 for part in of_rank)


def test_weighed_means_of_parts_are_means_of_the_whole(batch):
    torch.manual_seed(0)
    values = torch.randn(7, 9, 9, dtype=torch.float64)
    real = batch.attention_mask
    pairs = real[:, :, None] & real[:, None, :]

    def means(rows):
        return values[rows, :, 0][real[rows]].mean(), values[rows][pairs[rows]].mean(), values[rows, 0, 0].mean()

    whole = means(torch.arange(7))
    sums = [0.0, 0.0, 0.0]
    for part in (p for of_rank in all_parts(batch, 3, 2) for p in of_rank):
        own = means(part.batch.labels.long())
        shares = (part.tokens, part.pairs, part.rows)
        sums = [s + share * mean for s, share, mean in zip(sums, shares, own, strict=True)]
    torch.testing.assert_close(torch.stack(sums), torch.stack(whole), rtol=1e-13, atol=0)


def test_a_rank_without_rows_gets_one_that_weighs_nothing(batch):
    (part,) = split(batch, rank=8, ranks=9)
    assert len(part.batch) == 1
    assert (part.tokens, part.pairs, part.rows, part.last) == (0.0, 0.0, 0.0, True)


def test_an_uncut_batch_is_handed_on_untouched(batch):
    (part,) = split(batch)
    assert part.batch is batch
    assert part.whole


def test_prefetch_passes_parts_through_on_the_cpu_and_reads_nothing_ahead(batch):
    read = []

    def source():
        for part in split(batch, micro_batches=3):
            read.append(part)
            yield part

    for count, part in enumerate(prefetch(source(), torch.device("cpu")), start=1):
        assert len(read) == count
        assert part.batch.input_ids is read[-1].batch.input_ids
    assert count == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prefetch_brings_equal_parts_to_the_device(batch):
    whole = [part for _ in range(20) for part in split(batch, micro_batches=3)]
    busy = torch.randn(2048, 2048, device="cuda")
    for part, moved in zip(whole, prefetch(iter(whole), torch.device("cuda")), strict=True):
        busy = (busy @ busy).tanh()  # kernels that a copy could overtake
        assert moved.batch.input_ids.device.type == "cuda"
        assert torch.equal(moved.batch.input_ids.cpu(), part.batch.input_ids)
        assert torch.equal(moved.batch.labels.cpu(), part.batch.labels)
        assert (moved.tokens, moved.last, moved.batch.part) == (part.tokens, part.last, part.batch.part)
