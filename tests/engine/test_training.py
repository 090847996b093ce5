"""The training loop: batch order, resumption bit for bit, divergence, logging; and the files behind it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from engine.data import EncodedDataset
from engine.errors import UserError
from engine.objective import KDLoss
from engine.seeding import derive_seed, seed_everything
from engine.training.checkpoint import load_training_state, load_weights, save_weights
from engine.training.loop import Diverged, cycle, run_phase
from engine.training.optim import build_optimizer, linear_schedule
from engine.training.settings import PhaseSettings


@pytest.fixture
def data() -> EncodedDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=23)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(5, 50, size=offsets[-1]).astype(np.int32)
    return EncodedDataset(tokens=tokens, offsets=offsets, second=lengths.astype(np.int32))


class Probe(nn.Module):
    """A model with dropout, so that a wrong generator state shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 1))

    def loss(self, batch, step: int) -> KDLoss:
        value = (self.head(self.table(batch.input_ids)).squeeze(-1) * batch.attention_mask).square().mean()
        return KDLoss.of(value, hidden=value)


SETTINGS = PhaseSettings(steps=12, batch_size=4, lr=0.05, warmup_ratio=0.25)


def train(data, model, **options):
    return run_phase(
        "probe", model, lambda start: cycle(data, 4, seed=3, start_step=start), model.loss, SETTINGS, 12, **options
    )


def new_model() -> Probe:
    seed_everything(7)
    return Probe()


def test_cycle_repeats_epochs_in_new_orders_and_can_start_anywhere(data):
    whole = [b.input_ids.tolist() for b in itertools.islice(cycle(data, 4, seed=3), 14)]
    for start in (0, 1, 5, 6, 7, 13):
        part = [b.input_ids.tolist() for b in itertools.islice(cycle(data, 4, seed=3, start_step=start), 14 - start)]
        assert part == whole[start:]
    per_epoch = data.num_batches(4)
    epochs = [sorted(map(tuple, itertools.chain(*whole[k * per_epoch : (k + 1) * per_epoch]))) for k in (0, 1)]
    assert whole[:per_epoch] != whole[per_epoch : 2 * per_epoch]
    assert [len(e) for e in epochs] == [len(data), len(data)]


def test_resumed_phase_ends_bit_for_bit_where_the_undisturbed_one_ends(data, tmp_path):
    undisturbed = new_model()
    train(data, undisturbed)

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 8:
            raise Killed

    model = new_model()
    with pytest.raises(Killed):
        train(data, model, checkpoint=tmp_path / "c.pt", checkpoint_every=3, after_step=kill)
    seed_everything(99)  # the resumed process starts with other generator states and other weights
    resumed = Probe()
    assert train(data, resumed, checkpoint=tmp_path / "c.pt", checkpoint_every=3) == 6
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_extra_state_travels_with_the_checkpoint(data, tmp_path):
    seen = {}

    class Killed(Exception):
        pass

    def kill(done: int) -> None:
        if done == 7:
            raise Killed

    options = {"checkpoint": tmp_path / "c.pt", "checkpoint_every": 5, "restore_extra": seen.update}
    with pytest.raises(Killed):
        train(data, new_model(), after_step=kill, extra_state=lambda: {"best": torch.tensor(2.5)}, **options)
    train(data, new_model(), **options)
    assert float(seen["best"]) == 2.5


def test_logged_losses_are_means_over_the_steps_since_the_last_line(data):
    model, lines, losses = new_model(), [], []

    def loss(batch, step):
        terms = model.loss(batch, step)
        losses.append(terms.total.item())
        return terms

    run_phase("probe", model, lambda s: cycle(data, 4, seed=3, start_step=s), loss, SETTINGS, 12, log=lines.append)
    assert [line.step for line in lines] == [10, 12]
    assert lines[0].losses["total"] == pytest.approx(np.mean(losses[:10]), rel=1e-6)
    assert lines[1].losses["total"] == pytest.approx(np.mean(losses[10:]), rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_phase(data, bad):
    model = new_model()

    def loss(batch, step):
        terms = model.loss(batch, step)
        value = terms.total * bad if step == 4 else terms.total
        return replace(terms, total=value)

    with pytest.raises(Diverged, match="probe: the loss is not finite at step 10"):
        run_phase("probe", model, lambda s: cycle(data, 4, seed=3, start_step=s), loss, SETTINGS, 12)


def test_zero_steps_leave_the_model_alone(data):
    model = new_model()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    run_phase("probe", model, lambda s: cycle(data, 4, seed=3, start_step=s), model.loss, SETTINGS, 0)
    assert not model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_weights_round_trip_with_tied_tensors(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    save_weights(tmp_path / "w.safetensors", model)
    other = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    other["b"].weight = other["a"].weight
    load_weights(tmp_path / "w.safetensors", other)
    assert torch.equal(other["b"].weight, model["a"].weight)
    assert torch.equal(other["b"].bias, model["b"].bias)


def test_weights_of_another_model_are_refused(tmp_path):
    save_weights(tmp_path / "w.safetensors", nn.Linear(3, 3))
    for other in (nn.Linear(3, 4), nn.Linear(3, 3, bias=False), nn.Sequential(nn.Linear(3, 3))):
        with pytest.raises(UserError, match="does not fit the model"):
            load_weights(tmp_path / "w.safetensors", other)
    with pytest.raises(UserError, match="missing"):
        load_weights(tmp_path / "none.safetensors", nn.Linear(3, 3))


def test_a_checkpoint_never_runs_code(tmp_path):
    """Hostile on purpose: with a checksum that fits."""
    import hashlib
    import pickle

    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('code ran')",))

    code = pickle.dumps(Hostile())
    (tmp_path / "c.pt").write_bytes(code + b"ffnas-sha256" + hashlib.sha256(code).digest())
    model = nn.Linear(3, 3)
    optimizer = build_optimizer(model, lr=0.1)
    with pytest.raises(UserError, match="cannot be used"):
        load_training_state(tmp_path / "c.pt", model, optimizer, linear_schedule(optimizer, 1, 10))


def test_seeds_differ_by_name_and_are_stable():
    assert derive_seed(0, "stage1", 3) == derive_seed(0, "stage1", "3") == 3828678258214418667
    assert len({derive_seed(s, n) for s in range(20) for n in ("a", "b", "ab")}) == 60


@pytest.mark.parametrize(
    ("settings", "batches", "steps"), [((5, None), 100, 5), ((None, 1.5), 7, 11), ((0, None), 7, 0)]
)
def test_total_steps(settings, batches, steps):
    assert PhaseSettings(steps=settings[0], epochs=settings[1]).total_steps(batches) == steps
