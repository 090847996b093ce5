"""Prepared text: the same tokens as the tokenizer gives, shards that a kill does not change, exact positions."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from published_toys import VOCABULARY, WORDS, write_teacher

from engine.data import encode_text
from engine.data.pieces import Pieces
from engine.data.prepare import PrepareConfig, prepare_text
from engine.data.shards import load_prepared, read_manifest, weighted_rows
from engine.data.sources import is_prepared, read_documents
from engine.data.stream import stream_documents
from engine.data.text import split_sentences
from engine.errors import UserError
from engine.teacher import Teacher
from engine.training.loop import cycle

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_teacher(folder / "teacher")
    rng = random.Random(0)
    for name, documents in (("a", 120), ("b", 60)):
        lines = []
        for _ in range(documents):
            for _ in range(rng.randint(1, 6)):
                lines.append(" ".join(rng.choices(WORDS, k=rng.randint(1, 30))) + rng.choice([".", "?", ""]))
            lines.append("")
        (folder / f"{name}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Teacher.load(folder / "teacher").tokenizer


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of a few documents, so that small files have many; workers, which are new processes, get them whole."""
    monkeypatch.setattr("engine.data.prepare.BLOCK_CHARACTERS", 800)


def config(folder, out, **changes):
    values = {"text": [str(folder / "a.txt"), str(folder / "b.txt")], "shard_tokens": 1500, "workers": 1}
    return PrepareConfig(out=str(out), tokenizer=str(folder / "teacher"), max_length=24, **{**values, **changes})


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


STRANGE = [
    "", "  ", "the cat", "The CAT, was.",
    "caf\u00e9 na\u00efve \u00c5", "\u4e2d\u6587 text", "a\u00a0b\u2003c", "x\x1cy",
    "\x85", "\ufeffthe", "[MASK] the[SEP]cat", "\u00ad\u200bcat", "\u0130stanbul \u03a3\u03a3", "e\u0301 e \u0301",
    "a" * 150,
    "\U0001f600 cat", "don't ``quote''", "cat\tdog", "cat\rdog", "\x00cat \ufffd", "\u3000\u2028dog",
]  # fmt: skip


def test_word_table_gives_what_the_tokenizer_gives(tokenizer):
    """On odd characters and on random strings of them; learnt and known words alike."""
    pieces = Pieces(tokenizer)
    assert pieces.by_word
    rng = random.Random(1)
    alphabet = [c for text in STRANGE for c in text] + [*" aeiou.,!-'", *VOCABULARY[5:12]]
    texts = STRANGE + ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(3000)]
    for _ in range(2):
        ids, lengths = pieces(texts)
        expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert lengths.tolist() == [len(e) for e in expected]
        assert ids.tolist() == [i for e in expected for i in e]


def test_full_word_table_starts_again(tokenizer, monkeypatch):
    monkeypatch.setattr("engine.data.pieces.MAX_WORDS", 8)
    pieces = Pieces(tokenizer)
    for text in [*WORDS, *WORDS[::-1], "the cat " * 3, " ".join(WORDS)]:
        assert pieces([text])[0].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "text", ["a b. c\nd\n\ne", "", "\n\n", " = T =\n x\n = = H = =\n y\n = U =\n z", "a\nb\nc\n", "é\r\n\r\nb"]
)
def test_streamed_documents_are_those_read_at_once(tmp_path, text):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    if not text.strip():
        assert list(stream_documents(str(path))) == []
        return
    whole = read_documents(str(path))
    assert list(stream_documents(str(path))) == whole
    assert list(stream_documents(str(path), skip=1)) == whole[1:]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_tables_are_joined_to_documents(tmp_path, suffix):
    texts = [f'row {i}, "quoted"' for i in range(10)]
    path = tmp_path / f"t.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    else:
        import pandas

        table = pandas.DataFrame({"id": range(10), "text": texts})
        table.to_parquet(path) if suffix == "parquet" else table.to_csv(
            path, sep="\t" if suffix == "tsv" else ",", index=False
        )
    assert list(stream_documents(str(path))) == texts
    assert list(stream_documents(str(path), join=4)) == ["\n".join(texts[i : i + 4]) for i in (0, 4, 8)]
    assert list(stream_documents(str(path), join=4, skip=2)) == ["\n".join(texts[8:])]


def test_shards_hold_what_packing_in_memory_gives(folder, tokenizer, tmp_path):
    report = prepare_text(config(folder, tmp_path / "out"))
    data = load_prepared([str(tmp_path / "out")], tokenizer)
    documents = read_documents(str(folder / "a.txt")) + read_documents(str(folder / "b.txt"))
    expected = encode_text(documents, tokenizer, 24)
    assert report.tokens == data.num_tokens == expected.num_tokens
    assert report.shards == len(data.shards) > 3
    assert np.array_equal(data.lengths, expected.lengths)
    assert all(shard.tokens.dtype == np.uint16 and isinstance(shard.tokens, np.memmap) for shard in data.shards)
    rows = [5, len(data) - 1, 0, 77]
    one, other = data.collate(rows), expected.collate(rows)
    assert torch.equal(one.input_ids, other.input_ids)
    assert torch.equal(one.attention_mask, other.attention_mask)


def test_a_step_is_a_position(folder, tokenizer, tmp_path):
    prepare_text(config(folder, tmp_path / "out"))
    data = load_prepared([str(tmp_path / "out")], tokenizer)
    batches = cycle(data, 16, seed=3)
    whole = [next(batches).input_ids for _ in range(2 * data.num_batches(16) + 3)]
    for start in (1, data.num_batches(16), len(whole) - 1):
        assert torch.equal(next(cycle(data, 16, seed=3, start_step=start)).input_ids, whole[start])
    part = data.subset(50, seed=1)
    assert len(part) == 50
    assert part.fingerprint() != data.fingerprint()
    assert torch.equal(part.collate([3]).input_ids, data.collate([int(part.rows[3])]).input_ids)


@pytest.mark.slow  # two new processes that import everything
def test_workers_change_nothing(folder, tmp_path):
    """Blocks of the usual size here, since workers know no other."""
    import engine.data.prepare as module

    module.BLOCK_CHARACTERS = 1 << 20
    for workers in (1, 2):
        prepare_text(config(folder, tmp_path / str(workers), workers=workers))
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_stopped_anywhere_it_ends_with_the_same_bytes(folder, tmp_path):
    """Stopped after every possible number of blocks, shards already written included."""
    prepare_text(config(folder, tmp_path / "whole"))
    expected = content(tmp_path / "whole")

    class Stop(Exception):
        pass

    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    shutil.rmtree(tmp_path / "whole")
    prepare_text(config(folder, tmp_path / "whole"), count)
    for at in range(1, steps + 1, 3):
        seen = 0

        def stop(*_, at=at):
            nonlocal seen
            seen += 1
            if seen == at:
                raise Stop

        out = tmp_path / f"cut{at}"
        with pytest.raises(Stop):
            prepare_text(config(folder, out), stop)
        assert not is_prepared(str(out))
        kept = (out / "shard-00000").exists()
        report = prepare_text(config(folder, out))
        assert content(out) == expected
        assert (report.made < report.tokens) == kept
    again = prepare_text(config(folder, tmp_path / "whole"))
    assert again.made == 0


def test_killed_command_ends_with_the_same_bytes(folder, tmp_path):
    script = (
        "import sys, engine.data.prepare as p; p.BLOCK_CHARACTERS = 800;"
        "from search.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    texts = f"[{folder / 'a.txt'},{folder / 'b.txt'}]"
    options = ["--tokenizer", str(folder / "teacher"), "--max-length", "24", "--shard-tokens", "300", "--workers", "1"]

    def line(out):
        return [sys.executable, "-c", script, "prepare", "--text", texts, "--out", str(out), *options]

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line(tmp_path / "cut"), cwd=REPO, env=environment, stdout=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "shard-00001").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare_text(config(folder, tmp_path / "cut", shard_tokens=300))
    prepare_text(config(folder, tmp_path / "whole", shard_tokens=300))
    whole = content(tmp_path / "whole")
    assert content(tmp_path / "cut") == whole


def test_weights_are_passes_over_a_source(folder, tokenizer, tmp_path):
    prepare_text(config(folder, tmp_path / "out", weights=[0.5, 2.0]))
    data = load_prepared([str(tmp_path / "out")], tokenizer)
    manifest = read_manifest(tmp_path / "out")
    counts = [sum(s["rows"] for s in manifest["shards"] if s["source"] == n) for n in (0, 1)]
    used = np.bincount(data.rows, minlength=sum(counts))
    assert set(used[: counts[0]]) == {0, 1}
    assert used[: counts[0]].sum() == round(counts[0] / 2)
    assert set(used[counts[0] :]) == {2}
    assert prepare_text(config(folder, tmp_path / "out", weights=[1.0, 0.0])).made == 0  # tokens are kept
    assert len(load_prepared([str(tmp_path / "out")], tokenizer)) == counts[0]
    assert weighted_rows(10, 1.3, 0).tolist()[:10] == list(range(10))


def test_documents_are_cut_at_the_limit_and_rows_never_cross_them(folder, tokenizer, tmp_path):
    prepare_text(config(folder, tmp_path / "out", max_documents=7, text=[str(folder / "a.txt")]))
    data = load_prepared([str(tmp_path / "out")], tokenizer)
    expected = encode_text(read_documents(str(folder / "a.txt"))[:7], tokenizer, 24)
    assert np.array_equal(data.lengths, expected.lengths)


def test_what_goes_wrong_is_one_line(folder, tokenizer, tmp_path):
    out = tmp_path / "out"
    prepare_text(config(folder, out))
    with pytest.raises(UserError, match="shard_tokens: 99, but"):
        prepare_text(config(folder, out, shard_tokens=99))
    with pytest.raises(UserError, match="weights"):
        prepare_text(config(folder, out, weights=[1.0]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(UserError, match="is not empty"):
        prepare_text(config(folder, tmp_path / "other"))
    with pytest.raises(UserError, match="no such file"):
        prepare_text(config(folder, tmp_path / "none", text=["nowhere.txt"]))
    with pytest.raises(UserError, match="no source given"):
        prepare_text(config(folder, tmp_path / "none", text=[]))
    with pytest.raises(UserError, match="above"):
        load_prepared([str(out)], tokenizer, max_positions=16)
    write_teacher(tmp_path / "t2")
    vocab = (tmp_path / "t2" / "vocab.txt").read_text().replace("cat\n", "cats\n")
    from transformers import BertTokenizerFast

    (tmp_path / "t2" / "vocab.txt").write_text(vocab)
    with pytest.raises(UserError, match="prepared with tokenizer"):
        load_prepared([str(out)], BertTokenizerFast(vocab=str(tmp_path / "t2" / "vocab.txt")))


def test_damaged_shard_is_noticed_on_resuming(folder, tmp_path):
    class Stop(Exception):
        pass

    seen = 0

    def stop(*_):
        nonlocal seen
        seen += 1
        if seen == 8:
            raise Stop

    out = tmp_path / "out"
    with pytest.raises(Stop):
        prepare_text(config(folder, out, shard_tokens=300), stop)
    tokens = bytearray((out / "shard-00000" / "tokens.npy").read_bytes())
    tokens[-1] ^= 1
    (out / "shard-00000" / "tokens.npy").write_bytes(tokens)
    with pytest.raises(UserError, match=r"tokens\.npy was changed"):
        prepare_text(config(folder, out, shard_tokens=300))


def test_sentences_are_cut_where_they_end():
    import re

    plain = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"')\]])\s+|\s*\n\s*")
    rng = random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices(" \t\n.!?\"')]ab", k=rng.randint(0, 14)))
        pieces = [p for p in plain.split(text.strip()) if p]
        assert split_sentences(text) == pieces[:1] + [f" {p}" for p in pieces[1:]]
