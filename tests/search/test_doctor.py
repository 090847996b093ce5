"""`ffnas doctor`: reasons instead of crashes, no secrets, and a self-test that can fail."""

import pytest
import torch

from kernels.dispatch import load_backend
from search.cli import main
from search.commands import doctor


def test_the_whole_report_is_printed_without_secrets(capsys, monkeypatch, tmp_path):
    load_backend("cpu")  # with the true settings: a backend is loaded once per process
    secret = "hf_abcDEF123"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("CXX", f"/home/alice/{secret}/g++")
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "nowhere"))
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.5)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for title in doctor.SECTIONS:
        assert f"{title}:\n" in text
    for word in (torch.__version__.split("+")[0], "GiB free", "reference", "C++", "package `kernels`"):
        assert word in text
    for word in (secret, "alice", "/home/", "/root", "://"):
        assert word not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot write /home/bob/x.so", "cannot write ~/x.so"),
        ("see postgresql://me:pw@host/db now", "see <url> now"),
        ("two\n lines", "two lines"),
    ],
)
def test_private_parts_are_left_out(text, shown):
    assert doctor.public(text) == shown


def test_a_wrong_kernel_fails_the_self_test(capsys, monkeypatch):
    from kernels.backends.cpu import CpuBackend

    if isinstance(load_backend("cpu"), str):
        pytest.skip("no compiler here")
    forward = CpuBackend.forward

    def wrong(self, call, save):
        out, saved = forward(self, call, save)
        return out.mul_(1.001), saved

    monkeypatch.setattr(CpuBackend, "forward", wrong)
    monkeypatch.setattr(doctor, "SELF_TEST_SECONDS", 0.3)
    monkeypatch.setattr(doctor, "SECTIONS", {"self-test": doctor.self_test})
    assert main(["doctor"]) == 1
    assert "WRONG: disagrees" in capsys.readouterr().out


def test_a_part_that_fails_does_not_hide_the_others(capsys, monkeypatch):
    def ill():
        yield "first", "fine"
        raise RuntimeError("no such thing as /home/carol")

    monkeypatch.setattr(doctor, "SECTIONS", {"a": ill, "b": doctor.versions})
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "failed                 RuntimeError: no such thing as ~" in text
    assert "python" in text


def test_old_and_new_versions_are_marked(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "version", lambda name: {"torch": "2.4.1", "triton": "9.0"}.get(name, "5.20"))
    found = dict(doctor.versions())
    assert "too old: 2.11 or later is needed" in found["torch"]
    assert "untested" in found["triton"]


@pytest.mark.parametrize(
    ("bundled", "installed", "offers"), [("12.8", "13.0", True), ("13.1", "13.1", False), ("13.1", "13.0", False)]
)
def test_a_newer_assembler_is_offered(monkeypatch, tmp_path, bundled, installed, offers):
    """Triton's own may be older than the toolkit's."""
    pytest.importorskip("triton")
    for folder, release in (("own", bundled), ("toolkit/bin", installed)):
        (tmp_path / folder).mkdir(parents=True)
        for name in ("ptxas", "nvcc"):
            program = tmp_path / folder / name
            program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
            program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    monkeypatch.setenv(doctor.PTXAS, str(tmp_path / "own/ptxas"))
    line = dict(doctor.compilers())["ptxas of triton"]
    assert line.startswith(bundled)
    assert (f"export {doctor.PTXAS}={tmp_path}/toolkit/bin/ptxas" in line) == offers
    monkeypatch.setenv(doctor.PTXAS, str(tmp_path / "nothing"))
    assert "none found" in dict(doctor.compilers())["ptxas of triton"]


def test_a_gpu_this_pytorch_cannot_use_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("search.console.environment.shutil.which", lambda name: f"/usr/bin/{name}")
    assert "install a CUDA build" in dict(doctor.devices())["cuda"]
