"""Captured population steps: families, seating, buffers, counters, fall-back and retirement.

Without a device a stand-in takes the place of `torch.cuda.CUDAGraph`: it keeps the step function, and runs it at replay
after checking that everything it works on is still where it was. The real graph's test is marked `gpu`; it has not run.
"""

from __future__ import annotations

import itertools
import logging

import pytest
import torch

from engine.architecture.architecture import Architecture, LayerSpec
from engine.data import Batch, TaskSpec
from engine.distill import Distiller, Member, train_population
from engine.distill import graphs as graphs_module
from engine.distill.device_graph import DevicePrograms
from engine.distill.graphs import StepGraphs
from engine.distill.population import generator_state
from engine.objective import KDWeights
from engine.states import EncoderStates
from engine.student import FFNASConfig, FFNASForSequenceClassification
from engine.training.readout import Readout
from engine.training.settings import PhaseSettings
from kernels.language.expression import parse_expression

CPU = torch.device("cpu")
SPEC = TaskSpec("t", "classification", ("text",), "label", ("a", "b", "c"))
SETTINGS = PhaseSettings(steps=12, batch_size=3, lr=0.01, warmup_ratio=0.25)
STEPS = 12


class StandIn:
    """Runs the kept step at replay; `fails` is what capturing raises."""

    log: list[str] = []  # noqa: RUF012  reset by a fixture
    fails: Exception | None = None

    def warm(self, step):
        self.log.append("warm")
        step()

    def capture(self, step):
        if self.fails is not None:
            raise self.fails
        self.log.append("capture")
        self.step = step
        self.places = self._places()

    def replay(self):
        self.log.append("replay")
        assert self._places() == self.places, "something a graph works on was moved"
        self.step()

    def _places(self):
        """Addresses of the slot's weights, moments, learning rate, inputs and results."""
        cells = {n: c.cell_contents for n, c in zip(self.step.__code__.co_freevars, self.step.__closure__, strict=True)}
        slot, inputs, known = cells["slot"], cells["inputs"], cells["known"]
        moments = [t for s in slot.optimizer.state.values() for t in s.values()]
        tensors = [*slot.parameters, *moments, slot.lr, *inputs.tensors(), known.total, known.skipped]
        return [t.data_ptr() for t in tensors]


class HostPrograms:
    """Programs where a stand-in finds them: the plans themselves. Those of equal flags may take each other's place."""

    def __init__(self, plans, device):
        self.plans = tuple(plans)

    def load(self, plans):
        self.plans = tuple(plans)

    @classmethod
    def family(cls, plan):
        return int(plan.program.flags)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "log", [])
    monkeypatch.setattr(StandIn, "fails", None)
    return StandIn


class FixedTeacher:
    """An answer that is a function of the batch: [B, 2 heads, S, 3]."""

    num_layers = 2

    def states(self, batch, layers, *, need_logits, bf16):
        g = torch.Generator().manual_seed(int(batch.input_ids.sum()))
        rows, length = batch.input_ids.shape

        def draw(*shape):
            return torch.randn(*shape, generator=g)

        heads = [tuple(draw(rows, 2, length, 3) for _ in range(2)) for _ in "qk"]
        hidden = tuple(draw(rows, length, 6) for _ in range(2))
        return EncoderStates(draw(rows, length, 6), hidden, *heads, draw(rows, 3) if need_logits else None)


def batches(lengths=(7,)):
    g = torch.Generator().manual_seed(0)
    for length in itertools.cycle(lengths):
        ids = torch.randint(1, 30, (3, length), generator=g)
        mask = torch.arange(length)[None] < torch.tensor([[length], [3], [1]])
        yield Batch(ids * mask, mask, torch.zeros_like(ids), torch.tensor([0, 1, 2]))


def distiller(captured=True):
    made = Distiller(FixedTeacher(), 2, KDWeights(), SPEC, CPU)  # type: ignore[arg-type]
    if captured:
        made.graphs = StepGraphs(CPU, made.loss_of, (), graph=StandIn, programs=HostPrograms)
    return made


def member(*texts, seed=0, p_drop=0.0, stack=1):
    layers = Architecture(tuple(LayerSpec(parse_expression(t), stack, "1/2") for t in texts))
    config = FFNASConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        embedding_type="trigram", embedding_size=4, layers=layers, teacher_hidden_size=6, num_labels=3,
        hidden_dropout_prob=p_drop, attention_probs_dropout_prob=p_drop, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Member(FFNASForSequenceClassification(config), generator_state(CPU))


GELU, TANH, SWISH = (f"linear({name}(linear(x,wb1)),wb2)" for name in ("gelu", "tanh", "swish"))
WITH_X = "add(linear(gelu(linear(x,wb1)),wb2),x)"


def train(kd, members, part="task", steps=STEPS, lengths=(7,), **options):
    return train_population("probe", members, batches(lengths), kd, SETTINGS, steps, part, **options)


def assert_same_weights(a, b):
    for (name, left), right in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        # the learning rate of a captured step is a float32 tensor: it differs from the eager float64 by 6e-8
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_captured_populations_train_what_eager_ones_do(p_drop):
    texts = [(GELU, GELU), (TANH, SWISH), (WITH_X, GELU)]
    eager, captured = ([member(*t, seed=k, p_drop=p_drop) for k, t in enumerate(texts)] for _ in range(2))
    train(distiller(captured=False), eager)
    kd = distiller()
    outcomes = train(kd, captured)
    assert [o.state for o in outcomes] == ["done"] * 3
    for own, other in zip(captured, eager, strict=True):
        assert_same_weights(own.model, other.model)
    # members of one population are seated beside one another: two of one family need two slots
    assert kd.graphs.captures == 3
    assert kd.graphs.replays == 3 * (STEPS - 1)
    assert StandIn.log[:6] == ["warm"] * 3 + ["capture", "replay", "capture"]


def test_another_expression_of_the_family_is_replayed_without_a_capture():
    kd = distiller()
    train(kd, [member(GELU, TANH)])
    assert (kd.graphs.captures, kd.graphs.replays) == (1, STEPS - 1)
    later, alone = (member(SWISH, GELU, seed=5) for _ in range(2))
    train(kd, [later])
    assert (kd.graphs.captures, kd.graphs.replays) == (1, 2 * STEPS - 1)
    train(distiller(captured=False), [alone])
    assert_same_weights(later.model, alone.model)


@pytest.mark.parametrize("other", [(WITH_X, GELU), (GELU, WITH_X)])
def test_another_family_is_captured(other):
    kd = distiller()
    train(kd, [member(GELU, GELU)])
    train(kd, [member(*other)])
    train(kd, [member(GELU, GELU, stack=2)])
    train(kd, [member(GELU, GELU)], part="text")
    assert kd.graphs.captures == 4


def test_every_shape_of_batches_has_a_graph():
    kd = distiller()
    own, alone = (member(GELU, TANH) for _ in range(2))
    train(kd, [own], lengths=(7, 5, 7, 6))
    assert kd.graphs.captures == 3
    train(distiller(captured=False), [alone], lengths=(7, 5, 7, 6))
    assert_same_weights(own.model, alone.model)
    train(kd, [member(TANH, TANH)], lengths=(7, 5, 7, 6))
    assert kd.graphs.captures == 3


def test_more_shapes_than_there_is_room_for_run_eagerly(monkeypatch, caplog):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 1)
    kd = distiller()
    own, alone = (member(GELU, TANH) for _ in range(2))
    with caplog.at_level(logging.WARNING, "ffnas.training"):
        train(kd, [own], lengths=(7, 5))
    assert kd.graphs.captures == 1
    assert [r.message for r in caplog.records] == [
        "population: steps run eagerly, without a CUDA graph: batches have more than 1 shapes; the others"
    ]
    train(distiller(captured=False), [alone], lengths=(7, 5))
    assert_same_weights(own.model, alone.model)


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so_once(caplog):
    StandIn.fails = RuntimeError("operation not permitted when stream is capturing\nmore")
    kd = distiller()
    own, alone = ([member(GELU, TANH), member(WITH_X, GELU)] for _ in range(2))
    with caplog.at_level(logging.WARNING, "ffnas.training"):
        outcomes = train(kd, own)
    assert [o.state for o in outcomes] == ["done"] * 2
    assert (kd.graphs.captures, kd.graphs.replays) == (0, 0)
    assert [r.message for r in caplog.records] == [
        "population: steps run eagerly, without a CUDA graph: operation not permitted when stream is capturing"
    ]
    train(distiller(captured=False), alone)
    for a, b in zip(own, alone, strict=True):
        assert_same_weights(a.model, b.model)


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(graphs_module.ENVIRONMENT, "0")
    kd = distiller()
    train(kd, [member(GELU, TANH)])
    assert not StandIn.log


def test_the_students_own_model_is_the_one_that_trains_and_keeps_its_weights():
    """Scores at rungs see the weights of that step; a later student in the same slot changes nothing of an earlier."""
    kd, first = distiller(), member(GELU, TANH)
    start = first.model.classifier.weight.detach().clone()
    seen = []
    train(kd, [first], after_step=lambda _: seen.append(first.model.classifier.weight.detach().clone()))
    assert len({t.sum().item() for t in (start, *seen)}) == STEPS + 1
    kept = {n: t.clone() for n, t in first.model.state_dict().items()}
    train(kd, [member(SWISH, TANH, seed=3)])
    assert all(torch.equal(t, kept[n]) for n, t in first.model.state_dict().items())
    assert kd.graphs.captures == 1


def test_a_diverging_student_is_retired_alone_and_its_slot_serves_the_next():
    kd = distiller()
    sick, well, alone = member(GELU, TANH), member(GELU, GELU, seed=1), member(GELU, GELU, seed=1)
    with torch.no_grad():
        sick.model.classifier.bias.fill_(float("nan"))
    outcomes = train(kd, [sick, well])
    assert [o.state for o in outcomes] == ["failed", "done"]
    assert outcomes[0].reason == "probe: the loss is not finite at step 10"
    train(distiller(captured=False), [alone])
    assert_same_weights(well.model, alone.model)
    assert kd.graphs.captures == 2
    healthy, alone = (member(TANH, TANH, seed=2) for _ in range(2))
    train(kd, [healthy])
    train(distiller(captured=False), [alone])
    assert_same_weights(healthy.model, alone.model)
    assert kd.graphs.captures == 2


def test_losses_that_are_not_there_yet_are_judged_at_the_next_call(monkeypatch):
    """As on CUDA: the verdict of step 10 is heard at step 20."""
    monkeypatch.setattr(Readout, "ready", lambda self: False)
    sick, well = member(GELU, TANH), member(GELU, GELU)
    with torch.no_grad():
        sick.model.classifier.bias.fill_(float("nan"))
    living = []
    outcomes = train(distiller(), [sick, well], steps=25, after_step=lambda _: living.append(sick.alive))
    assert [o.state for o in outcomes] == ["failed", "done"]
    assert outcomes[0].reason == "probe: the loss is not finite at step 10"
    assert living.index(False) + 1 == 20


def test_lack_of_memory_while_capturing_postpones_the_youngest():
    kd = distiller()
    old, young, alone = member(GELU, TANH), member(GELU, GELU, seed=1), member(GELU, TANH)
    train_one = StandIn.capture

    def tight(self, step):
        if sum(m.alive for m in (old, young)) > 1:
            raise torch.OutOfMemoryError("no memory")
        train_one(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandIn, "capture", tight)
        outcomes = train(kd, [old, young])
    assert [o.state for o in outcomes] == ["done", "postponed"]
    train(distiller(captured=False), [alone])
    assert_same_weights(old.model, alone.model)
    assert kd.graphs.captures == 1


def test_free_slots_are_few(monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_FREE", 1)
    kd = distiller()
    for texts in ((GELU, GELU), (WITH_X, GELU), (GELU, GELU)):
        train(kd, [member(*texts)])
    assert kd.graphs.captures == 3


def test_models_of_others_run_eagerly(caplog):
    kd = distiller()
    with caplog.at_level(logging.WARNING, "ffnas.training"):
        assert kd.graphs.seat(torch.nn.Linear(2, 2), SETTINGS, "text") is None
    assert "not an ffnas model" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("p_drop", [0.0, 0.3])
def test_on_a_device_a_replay_serves_a_new_expression(p_drop):
    device = torch.device("cuda")
    moved = lambda: (b.to(device) for b in batches())  # noqa: E731

    class Teacher(FixedTeacher):
        def states(self, batch, layers, **options):
            return super().states(batch, layers, **options).map(lambda t: t.to(device))

    def run(captured, texts, seed):
        own = member(*texts, seed=seed, p_drop=p_drop)
        own.model.to(device)
        torch.cuda.manual_seed(seed)
        own.rng = generator_state(device)
        kd.graphs = graphs if captured else None
        assert train_population("probe", [own], moved(), kd, SETTINGS, STEPS, "task")[0].state == "done"
        return own.model

    kd = Distiller(Teacher(), 2, KDWeights(), SPEC, device)  # type: ignore[arg-type]
    graphs = kd.graphs
    run(True, (GELU, TANH), 0)
    first = graphs.captures
    model = run(True, (SWISH, GELU), 5)
    assert first == graphs.captures == 1
    assert graphs.replays == 2 * STEPS - 1
    assert_same_weights(model.cpu(), run(False, (SWISH, GELU), 5).cpu())


def test_device_programs_tell_families_apart(monkeypatch):
    """Without Triton's kernels a graph serves its own programs only."""
    plans = [m.model.base_model.planner.full[0] for m in (member(GELU, GELU), member(TANH, TANH), member(WITH_X, GELU))]
    monkeypatch.setattr(graphs_module.dispatch, "preferred_backend", lambda _: "reference")
    assert len({DevicePrograms.family(p) for p in plans}) == 3
    monkeypatch.setattr(graphs_module.dispatch, "preferred_backend", lambda _: "triton")
    assert len({DevicePrograms.family(p) for p in plans}) == 2


def test_programs_of_other_backends_need_no_buffers(monkeypatch):
    """Their kernels do not read any; all their programs' words are the family, so that a graph serves no others."""
    monkeypatch.setattr(graphs_module.dispatch, "preferred_backend", lambda _: "cuda")
    plans = member(GELU, TANH).model.base_model.planner.full
    programs = DevicePrograms(plans, CPU)
    assert programs.plans == tuple(plans)
    programs.load(plans)
    assert programs.plans == tuple(plans)
