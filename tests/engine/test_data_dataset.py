"""EncodedDataset: packed rows survive selection, saving and mapping from disk."""

import json

import numpy as np
import pytest
from data_toys import dataset

from engine.data import EncodedDataset
from engine.errors import UserError


def rows(data):
    return [data.row(i).tolist() for i in range(len(data))]


def test_select_takes_rows_in_the_order_asked_for():
    data = dataset([3, 1, 7, 5])
    part = data.select([2, 0, 2])
    assert rows(part) == [rows(data)[2], rows(data)[0], rows(data)[2]]
    assert part.labels.tolist() == [2, 0, 2]
    assert part.second.tolist() == [3, 1, 3]
    assert len(data.select([])) == 0


def test_subset_is_a_seeded_sample_in_stored_order():
    data = dataset(list(range(1, 46)))
    part = data.subset(7, seed=1)
    assert part.labels.tolist() == sorted(set(part.labels.tolist()))
    assert len(part) == 7
    assert part.labels.tolist() == data.subset(7, seed=1).labels.tolist() != data.subset(7, seed=2).labels.tolist()
    assert data.subset(45) is data
    assert data.subset(1000) is data


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("labels", [True, False])
def test_saved_data_reads_back_equal(tmp_path, mmap, labels):
    data = dataset([3, 1, 7, 5], labels=labels)
    data.save(tmp_path / "d")
    back = EncodedDataset.load(tmp_path / "d", mmap=mmap)
    assert isinstance(back.tokens, np.memmap) == mmap
    assert rows(back) == rows(data)
    assert back.fingerprint() == data.fingerprint()
    assert (back.pad_id, back.uses_token_types, back.truncated) == (3, True, 0)
    first, second = (list(d.batches(2, seed=1)) for d in (data, back))
    assert all(a.input_ids.equal(b.input_ids) for a, b in zip(first, second, strict=True))


def test_saving_again_replaces_the_folder_and_leaves_nothing_else(tmp_path):
    dataset([3, 1]).save(tmp_path / "d")
    dataset([4, 4, 4], labels=False).save(tmp_path / "d")
    assert len(EncodedDataset.load(tmp_path / "d")) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["d"]
    assert not (tmp_path / "d" / "labels.npy").exists()


def test_pickled_arrays_and_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a saved data set"):
        EncodedDataset.load(tmp_path / "missing")
    dataset([3, 1]).save(tmp_path / "d")
    np.save(tmp_path / "d" / "tokens.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for mmap in (True, False):
        with pytest.raises(UserError, match=r"Python objects in dtype|allow_pickle=False"):
            EncodedDataset.load(tmp_path / "d", mmap=mmap)
    dataset([3, 1]).save(tmp_path / "e")
    np.save(tmp_path / "e" / "tokens.npy", np.arange(3, dtype=np.int32))
    with pytest.raises(UserError, match="do not fit together"):
        EncodedDataset.load(tmp_path / "e")
    (tmp_path / "e" / "meta.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(UserError, match="format 9"):
        EncodedDataset.load(tmp_path / "e")


def test_fingerprint_sees_every_part():
    base = dataset([3, 1, 7])
    assert base.fingerprint() == dataset([3, 1, 7]).fingerprint()
    others = [dataset([3, 1, 7], labels=False), dataset([3, 7, 1]), base.select([0, 1]), base.select([1, 0, 2])]
    changed = dataset([3, 1, 7])
    changed.second[1] = 1
    assert len({d.fingerprint() for d in [base, changed, *others]}) == 6


def test_arrays_that_do_not_fit_are_refused():
    good = dataset([3, 1])
    with pytest.raises(ValueError, match="fit together"):
        EncodedDataset(good.tokens.astype(np.int64), good.offsets, good.second)
    with pytest.raises(ValueError, match="fit together"):
        EncodedDataset(good.tokens, good.offsets, good.second[:1])
