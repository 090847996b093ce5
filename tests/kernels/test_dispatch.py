"""Choosing a backend: order, override, fallback messages, and backward on forward's backend."""

from __future__ import annotations

import warnings

import pytest
import torch

from kernels import dispatch
from kernels.backends.reference import ReferenceBackend
from kernels.call import Backend, BackendUnavailable
from kernels.dispatch import BackendError, BackendFallbackWarning, available_backends, use_backend
from kernels.ffn.ops import fused_ffn
from kernels.losses.ops import soft_cross_entropy

TEXT = "linear(gelu(linear(x,wb1)),wb2)"


class Recording(ReferenceBackend):
    """The reference under another name, refusing `refuse`d dtypes and noting what it runs."""

    def __init__(self, name: str, refuse: tuple[torch.dtype, ...] = ()) -> None:
        self.name = name
        self.refuse = refuse
        self.ran: list[str] = []

    def supports(self, call):
        return f"no {call.x.dtype}" if call.x.dtype in self.refuse else None

    def forward(self, call, save):
        self.ran.append("forward")
        return super().forward(call, save)

    def backward(self, call, grad_out, saved, needs, overwrite=False):
        self.ran.append("backward")
        return super().backward(call, grad_out, saved, needs, overwrite)


@pytest.fixture
def backends(monkeypatch):
    """Recording stand-ins for `cpu` and `reference`, no warnings remembered, no environment."""
    loaded = {"cpu": Recording("cpu", (torch.float64,)), "reference": Recording("reference"), "cuda": "no device"}
    monkeypatch.setattr(dispatch, "_loaded", loaded)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    return loaded


def call(dtype=torch.float32, **options):
    inputs = [torch.ones(s, dtype=dtype, requires_grad=True) for s in ((2, 3), (4, 3), (4,), (3, 4), (3,), (3,), (3,))]
    return fused_ffn(*inputs, TEXT, **options)


def test_the_device_decides_the_order(backends):
    call()
    assert backends["cpu"].ran == ["forward"]
    assert backends["reference"].ran == []


def test_a_fallback_is_said_once_with_its_reason(backends):
    with pytest.warns(BackendFallbackWarning, match=r"'cpu' not used: no torch.float64"):
        call(torch.float64)
    assert backends["reference"].ran == ["forward"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(torch.float64)


def test_use_backend_wins_over_the_environment(backends, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with use_backend("reference"):
        call()
    assert backends["reference"].ran == ["forward"]
    call()
    assert backends["cpu"].ran == ["forward"]


def test_the_environment_chooses(backends, monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "reference")
    call()
    assert backends["reference"].ran == ["forward"]


def test_a_forced_backend_that_cannot_serve_falls_back(backends):
    with use_backend("cuda"), pytest.warns(BackendFallbackWarning, match="'cuda' not used: no device"):
        call()
    assert backends["cpu"].ran == ["forward"]


def test_strict_raises_instead(backends):
    with use_backend("cuda", strict=True), pytest.raises(BackendError, match="no device"):
        call()


def test_backward_runs_where_forward_ran(backends):
    with use_backend("reference"):
        out = call()
    out.sum().backward()
    assert backends["reference"].ran == ["forward", "backward"]
    assert backends["cpu"].ran == []


class Smallest(Backend):
    """A backend with what it must have and nothing else: FFNs, run by the reference."""

    name = "cpu"
    supports = ReferenceBackend.supports
    forward = ReferenceBackend.forward
    saved_like = ReferenceBackend.saved_like
    backward = ReferenceBackend.backward


def test_a_backend_needs_four_methods(backends):
    """What it leaves out has defaults: no groups, no losses, layout 0."""
    backends["cpu"] = Smallest()
    out = call()
    out.sum().backward()
    with use_backend("reference"):
        torch.testing.assert_close(out, call())
    assert Smallest().saved_layout == 0
    assert Smallest().supports_group([]) == "it serves one call at a time"
    logits = torch.randn(2, 3)
    with pytest.warns(BackendFallbackWarning, match="'cpu' not used: it has no losses and no attention"):
        loss = soft_cross_entropy(logits, logits)
    assert loss > 0
    assert not dispatch.has_kernels(logits)
    with use_backend("cpu", strict=True), pytest.raises(BackendError, match="soft cross-entropy: it has no losses"):
        soft_cross_entropy(logits, logits)


def test_unknown_names_are_refused(backends, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown backend 'gpu', use one of reference, cpu"), use_backend("gpu"):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT, "gpu")
    with pytest.raises(ValueError, match=r"FFNAS_BACKEND: unknown backend 'gpu'"):
        call()


def test_a_backend_that_cannot_be_loaded_gives_its_reason(monkeypatch):
    def load():
        raise BackendUnavailable("no compiler found")

    module = type("Module", (), {"load": staticmethod(load)})
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch.importlib, "import_module", lambda name: module)
    assert available_backends() == dict.fromkeys(dispatch.BACKENDS, "no compiler found")


def test_backends_not_in_this_version_are_named(monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", ("reference", "quantum"))
    monkeypatch.setattr(dispatch, "_loaded", {})
    assert available_backends() == {"reference": None, "quantum": "this version of ffnas does not have it"}
