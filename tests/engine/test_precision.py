"""What `auto` means for device and precision."""

import pytest
import torch

from engine.errors import UserError
from engine.training import precision
from engine.training.precision import choose_device, choose_precision

CPU = torch.device("cpu")


def test_named_precisions_are_taken_without_measuring(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_seconds", lambda step: pytest.fail("measured"))
    assert [choose_precision(n, CPU, 8, 8, 2) for n in ("fp32", "bf16")] == ["fp32", "bf16"]


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(1.0, 0.5, "bf16"), (1.0, 0.9, "fp32"), (0.5, 1.0, "fp32")])
def test_bf16_must_win_by_a_margin(monkeypatch, fp32, bf16, chosen):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "_cpu_seconds", lambda step: (fp32, bf16))
    assert choose_precision("auto", CPU, 8, 8, 2) == chosen


def test_machines_without_bf16_do_not_measure(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(precision, "_cpu_seconds", lambda step: pytest.fail("measured"))
    assert choose_precision("auto", CPU, 8, 8, 2) == "fp32"


@pytest.mark.parametrize("training", [True, False])
def test_the_measured_step_runs_and_leaves_the_generator_and_threads_alone(monkeypatch, training):
    seen = []
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    original = precision._layer_step

    def spying(*args):
        step = original(*args)
        return lambda bf16: (seen.append((bf16, torch.get_num_threads())), step(bf16))

    monkeypatch.setattr(precision, "_layer_step", spying)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    chosen = choose_precision("auto", CPU, 24, 12, 3, training=training, batch=(2, 5))
    assert chosen in ("fp32", "bf16")
    assert {bf16 for bf16, _ in seen} == {True, False}
    assert {n for _, n in seen} == {1}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("slow", "calls"), [(1.0, 16), (2.9, 16), (20.0, 4), (0.05, 4)])
def test_a_clear_difference_is_measured_once(monkeypatch, slow, calls):
    """A clock that a step in bf16 moves `slow` times as far as one in fp32."""
    now, seen = [0.0], []
    monkeypatch.setattr(precision.time, "thread_time", lambda: now[0])

    def step(bf16):
        seen.append(bf16)
        now[0] += slow if bf16 else 1.0

    assert precision._cpu_seconds(step) == pytest.approx((1.0, slow))
    assert len(seen) == calls  # the warm-up and one round, or all of them


@pytest.mark.parametrize(("name", "message"), [("tpu9", "not a device"), ("mps", "not supported")])
def test_wrong_devices_are_named(name, message):
    with pytest.raises(UserError, match=message):
        choose_device(name)
