"""The population step: equal to single runs, one teacher pass, divergence and lack of memory, side by side."""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch import nn

from engine.data import EncodedDataset
from engine.distill import Member, PopulationStep, train_population
from engine.distill.population import generator_state, side_by_side, uses_dropout
from engine.objective import KDLoss, KDWeights
from engine.seeding import seed_everything
from engine.training.loop import cycle, run_phase
from engine.training.settings import PhaseSettings

SETTINGS = PhaseSettings(steps=12, batch_size=4, lr=0.05, warmup_ratio=0.25)
STEPS = 12


@pytest.fixture
def data() -> EncodedDataset:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, size=23)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = rng.integers(5, 50, size=offsets[-1]).astype(np.int32)
    return EncodedDataset(tokens=tokens, offsets=offsets, second=lengths.astype(np.int32))


class Student(nn.Module):
    def __init__(self, width: int, p_drop: float) -> None:
        super().__init__()
        self.table = nn.Embedding(50, width)
        self.head = nn.Sequential(nn.Linear(width, 6), nn.Dropout(p_drop), nn.Linear(6, 1))

    def forward(self, batch):
        return self.head(self.table(batch.input_ids)).squeeze(-1) * batch.attention_mask


class CountingDistiller:
    """A teacher whose answer is a function of the batch; counts its passes."""

    device = torch.device("cpu")
    graphs = None
    weights = KDWeights()

    def __init__(self) -> None:
        self.passes = 0
        self.threads: set[str] = set()
        self.fail_for: dict[int, float] = {}
        self.memory_for = 10**9

    def targets(self, batch, *, need_logits):
        self.passes += 1
        return batch.input_ids.float() / 50

    def text_loss(self, student, batch, *, targets):
        self.threads.add(threading.current_thread().name)
        if student.table.embedding_dim > self.memory_for:
            raise torch.OutOfMemoryError("no memory")
        value = (student(batch) - targets).square().mean() * self.fail_for.get(student.table.embedding_dim, 1.0)
        return KDLoss.of(value, hidden=value)

    task_loss = text_loss


def make(width: int, p_drop: float) -> Member:
    seed_everything(width)
    model = Student(width, p_drop)
    return Member(model, generator_state(torch.device("cpu")))


def train(data, members, distiller, **options):
    batches = cycle(data, 4, seed=3)
    return train_population("probe", members, batches, distiller, SETTINGS, STEPS, "text", **options)


def single(data, width, p_drop):
    """The same student by the plain training loop."""
    distiller = CountingDistiller()
    seed_everything(width)
    model = Student(width, p_drop)
    run_phase(
        "probe",
        model,
        lambda start: cycle(data, 4, seed=3, start_step=start),
        lambda batch, _: distiller.text_loss(model, batch, targets=distiller.targets(batch, need_logits=False)),
        SETTINGS,
        STEPS,
    )
    return model


def assert_same_weights(a, b):
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("p_drop", [0.0, 0.5])
def test_population_equals_single_runs_bit_for_bit(data, p_drop):
    members, distiller = [make(w, p_drop) for w in (4, 5, 8)], CountingDistiller()
    outcomes = train(data, members, distiller)
    assert [o.state for o in outcomes] == ["done"] * 3
    assert distiller.passes == STEPS
    for member, width in zip(members, (4, 5, 8), strict=True):
        assert_same_weights(member.model, single(data, width, p_drop))


def test_the_callers_generator_is_left_alone(data):
    members = [make(4, 0.5), make(5, 0.5)]
    torch.manual_seed(99)
    before = torch.get_rng_state()
    train(data, members, CountingDistiller())
    assert torch.equal(torch.get_rng_state(), before)


def test_students_side_by_side_equal_single_runs_of_as_many_threads(data):
    before = torch.get_num_threads()
    distiller = CountingDistiller()
    members = [make(w, 0.0) for w in (4, 5, 8)]
    train(data, members, distiller, workers=2, threads=1)
    assert len({n for n in distiller.threads if n.startswith("ffnas-student")}) == len(distiller.threads) >= 1
    assert torch.get_num_threads() == before
    torch.set_num_threads(1)
    try:
        for member, width in zip(members, (4, 5, 8), strict=True):
            assert_same_weights(member.model, single(data, width, 0.0))
    finally:
        torch.set_num_threads(before)


def test_students_with_dropout_run_one_after_the_other(data):
    members = [make(4, 0.5), make(5, 0.5)]
    step = PopulationStep(CountingDistiller(), members, SETTINGS, STEPS, "text", workers=2, threads=1)
    assert step.workers == 1
    assert uses_dropout(members[0].model)
    assert not uses_dropout(make(4, 0.0).model)


def test_a_diverging_student_is_retired_alone(data):
    distiller = CountingDistiller()
    distiller.fail_for[5] = float("nan")
    members = [make(w, 0.0) for w in (4, 5, 8)]
    outcomes = train(data, members, distiller)
    assert [o.state for o in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].reason == "probe: the loss is not finite at step 10"
    for k, width in ((0, 4), (2, 8)):
        assert_same_weights(members[k].model, single(data, width, 0.0))


def test_without_memory_the_youngest_wait_and_the_others_go_on(data):
    """From the fifth step on there is room for one student less."""
    members, distiller = [make(w, 0.5) for w in (4, 5, 8)], CountingDistiller()
    calls = itertools.count()
    plain = distiller.text_loss

    def tight(student, batch, *, targets):
        if next(calls) >= 12 and sum(m.alive for m in members) > 2:
            raise torch.OutOfMemoryError("no memory")
        return plain(student, batch, targets=targets)

    distiller.text_loss = tight
    outcomes = train(data, members, distiller)
    assert [o.state for o in outcomes] == ["done", "done", "postponed"]
    for k, width in ((0, 4), (1, 5)):
        assert_same_weights(members[k].model, single(data, width, 0.5))


def test_a_student_too_large_even_alone_fails_with_that_reason(data):
    distiller = CountingDistiller()
    distiller.memory_for = 5
    outcomes = train(data, [make(8, 0.0)], distiller)
    assert (outcomes[0].state, outcomes[0].reason) == ("failed", "out of memory")


def test_kept_targets_spare_the_teacher(data):
    distiller = CountingDistiller()
    kept = {}

    def targets(step, batch):
        if step not in kept:
            kept[step] = distiller.targets(batch, need_logits=False)
        return kept[step]

    for _ in range(2):
        train(data, [make(4, 0.0)], distiller, targets=targets)
    assert distiller.passes == STEPS


def test_workers_follow_from_the_setting_and_the_machine():
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    workers, each = side_by_side(10**6, cpu)
    assert (workers, each) == (threads, 1)
    assert side_by_side(1, cpu) == (1, threads)
    assert side_by_side(8, torch.device("cuda", 0))[0] == 1
