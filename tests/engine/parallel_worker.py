"""Run by test_parallel.py as each of several ranks: `parallel_worker.py SCENARIO FOLDER`.

Trains a toy supernet whose steps use different parameters, in float64 so that rounding cannot hide an error, and
saves its weights as FOLDER/SCENARIO-SIZE.pt on the first rank.
"""

import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from engine.data import EncodedDataset
from engine.errors import UserError
from engine.objective import KDLoss, KDWeights
from engine.seeding import seed_everything
from engine.training import loop as training
from engine.training.loop import cycle, run_phase
from engine.training.parallel import ALONE, RankLost, join
from engine.training.settings import PhaseSettings

WEIGHTS = KDWeights(hidden=1.0, attention=0.5, prediction=2.0)
STEPS = 12
BATCH = 5


def toy_data(rows: int = 23) -> EncodedDataset:
    """23 rows: the last batch of 5 has 3, so that two ranks of two micro-batches leave one part empty."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(5, 50, size=offsets[-1]).astype(np.int32)
    return EncodedDataset(tokens=tokens, offsets=offsets, second=lengths.astype(np.int32))


class ToySupernet(nn.Module):
    """A path of its own for every third step, and one that is never used."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.paths = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def loss(self, batch, step: int) -> KDLoss:
        states = self.dropout(self.paths[step % 3](self.table(batch.input_ids)).tanh())
        real = batch.attention_mask
        hidden = states[real].square().mean()
        pairs = real[:, :, None] & real[:, None, :]
        attention = (states @ states.transpose(1, 2))[pairs].square().mean()
        prediction = (states[:, 0].sum(-1) - 1).square().mean()
        total = WEIGHTS.hidden * hidden + WEIGHTS.attention * attention + WEIGHTS.prediction * prediction
        return KDLoss.of(total, hidden=hidden, attention=attention, prediction=prediction)


class Killed(Exception):
    """Stands for a kill."""


def train(ranks=ALONE, *, dropout=0.0, accumulate=1, model=None, **options):
    if model is None:
        seed_everything(7)
        model = ToySupernet(dropout).double()
        if ranks.rank:
            seed_everything(1000 + ranks.rank)
    data = toy_data()
    settings = PhaseSettings(steps=STEPS, batch_size=BATCH, lr=0.05, warmup_ratio=0.25, accumulate=accumulate)
    lines = []
    run_phase(
        "toy",
        model,
        lambda start: cycle(data, BATCH, seed=3, start_step=start),
        model.loss,
        settings,
        STEPS,
        weights=WEIGHTS,
        ranks=ranks,
        log=lines.append,
        **options,
    )
    return model, [line.losses for line in lines]


def keep(ranks, folder: Path, name: str, model, losses) -> None:
    """Saves what the first rank has; checks that the others have the same."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    blocks = ranks.gather(torch.frombuffer(bytearray(flat.numpy().tobytes()), dtype=torch.uint8))
    assert all(torch.equal(block, blocks[0]) for block in blocks), "ranks differ"
    if ranks.is_first:
        torch.save({"model": model.state_dict(), "losses": losses}, folder / f"{name}.pt")


def all_scenarios(ranks, folder: Path) -> None:
    keep(ranks, folder, "plain", *train(ranks))
    keep(ranks, folder, "accumulated", *train(ranks, accumulate=2))
    model, _ = train(ranks)
    keep(ranks, folder, "twice", *train(ranks, model=model))  # a second phase on the same model

    keep(ranks, folder, "dropout", *train(ranks, dropout=0.5, accumulate=2))
    checkpoint = folder / "state.pt"

    # a kill right behind the checkpoint of step 6, of all ranks at once
    original = training.save_training_state

    def save_then_stop(*args, **kwargs):
        original(*args, **kwargs)
        if args[4] == 6:
            raise Killed

    training.save_training_state = save_then_stop
    try:
        train(ranks, dropout=0.5, accumulate=2, checkpoint=checkpoint, checkpoint_every=3)
        raise AssertionError("not stopped")
    except Killed:
        pass
    training.save_training_state = original
    seed_everything(99 + ranks.rank)  # a new process has other weights and generators
    fresh = ToySupernet(0.5).double()
    resumed, _ = train(ranks, dropout=0.5, accumulate=2, model=fresh, checkpoint=checkpoint, checkpoint_every=3)
    keep(ranks, folder, "resumed", resumed, [])


def messages(ranks, folder: Path) -> None:
    assert ranks.agree(lambda: {"a": [1, "zwei"]} if ranks.is_first else None) == {"a": [1, "zwei"]}
    assert ranks.first(lambda: object()) is None or ranks.is_first
    assert ranks.send(b"" if ranks.is_first else b"other") == b""
    assert [bytes(b.numpy()) for b in ranks.gather(torch.arange(ranks.rank, dtype=torch.uint8))] == [b"", b"\0"]

    def fail():
        raise UserError("stage1.trials: wrong")

    for call in (ranks.first, ranks.agree):
        with pytest.raises(UserError, match=r"^stage1\.trials: wrong$"):
            call(fail)
    with pytest.raises(UserError, match=r"^stage1\.trials: wrong$"):
        ranks.together(lambda: fail() if ranks.rank == 1 else None)
    assert ranks.together(lambda: ranks.rank) == ranks.rank


def waiting(ranks, folder: Path) -> None:
    """The first rank works for two seconds; the other must not use the processor meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    ranks.first(lambda: time.sleep(2.0))
    after = resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.5, f"rank {ranks.rank} used {used:.2f} s while waiting"


def dead(ranks, folder: Path) -> None:
    """The second rank dies without a word while the first trains, the first must notice."""
    train(ranks)
    if ranks.rank == 1:
        os._exit(9)
    try:
        train(ranks)
        raise AssertionError("not noticed")
    except RankLost as error:
        (folder / "lost").write_text(str(error))
    os._exit(3)


if __name__ == "__main__":
    scenario, target = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    with join(cuda=False) as these:
        for name in scenario.split(","):
            globals()[name](these, target)
