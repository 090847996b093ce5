"""Building the C++ library at first use, with a stand-in compiler that writes down how it was called."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import build, dispatch, fused_ffn
from kernels.build import BuildError, library_path

COMPILER = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = "--version" ] && {{ echo "stand-in 1.0"; exit 0; }}
{rule}
while [ $# -gt 1 ]; do [ "$1" = "-o" ] && {{ sleep {delay}; echo compiled > "$2"; }}; shift; done
exit 0
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Installs a stand-in compiler and an empty cache; returns a function that reads the calls made so far."""
    log = tmp_path / "calls.txt"

    def install(rule="", delay=0):
        script = tmp_path / "compiler"
        script.write_text(COMPILER.format(log=log, rule=rule, delay=delay))
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))
        monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(build, "LIBRARY_NAME", "absent.so")
        return lambda: log.read_text().splitlines() if log.exists() else []

    return install


def test_first_use_builds_once_and_tells(compiler, capsys):
    calls = compiler()
    first = library_path()
    assert first.read_text() == "compiled\n"
    assert "building the CPU kernels" in capsys.readouterr().err
    links = sum("-shared" in line for line in calls())
    assert links == 1
    assert library_path() == first
    assert sum("-shared" in line for line in calls()) == 1
    assert capsys.readouterr().err == ""


def test_other_flags_are_another_library(compiler, monkeypatch):
    compiler()
    plain = library_path()
    monkeypatch.setenv("FFNAS_CXXFLAGS", "-fsanitize=address")
    assert library_path() != plain


def test_several_processes_build_once(compiler, tmp_path):
    calls = compiler(delay=0.05)
    code = "from kernels import build; build.LIBRARY_NAME = 'absent.so'; print(build.library_path())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {p.communicate(timeout=120)[0] for p in processes}
    assert [p.returncode for p in processes] == [0, 0, 0]
    assert len(paths) == 1
    assert sum("-shared" in line for line in calls()) == 1
    assert not [f for f in (tmp_path / "cache").iterdir() if f.name.startswith(".build-")]


def test_instruction_sets_the_compiler_does_not_know_are_left_out(compiler):
    calls = compiler(rule='case "$*" in *amx*) echo "error: unknown argument -mamx-tile" >&2; exit 1;; esac')
    library_path()
    (api,) = [line for line in calls() if "api.cpp" in line]
    assert "-DFFNAS_WITH_AVX2" in api
    assert "-DFFNAS_WITH_AMX" not in api


def test_a_failing_compiler_is_quoted_and_leaves_nothing(compiler, tmp_path):
    compiler(rule='case "$*" in *generic*) echo "x.h:1: error: no such thing" >&2; exit 1;; esac')
    with pytest.raises(BuildError, match=r"do not compile: x\.h:1: error: no such thing") as error:
        library_path()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*.so"))


def test_an_unusable_cache_names_the_variable(compiler, tmp_path, monkeypatch):
    compiler()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("FFNAS_CACHE", str(blocked / "cache"))
    with pytest.raises(BuildError, match="set FFNAS_CACHE"):
        library_path()


def test_without_a_compiler_the_reference_serves_and_one_line_says_so(compiler, monkeypatch):
    compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "_loaded", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    x, weights = torch.randn(3, 8), [torch.randn(4, 8), torch.zeros(4), torch.randn(8, 4), torch.zeros(8)]
    norm = [torch.ones(8), torch.zeros(8)]
    text = "linear(gelu(linear(x,wb1)),wb2)"
    with pytest.warns(dispatch.BackendFallbackWarning, match="no C\\+\\+ compiler found.*install g\\+\\+") as seen:
        out = [fused_ffn(x, *weights, *norm, text) for _ in range(2)]
    assert len(seen) == 1
    assert dispatch.preferred_backend("cpu") == "reference"
    body = torch.nn.functional.linear(x, weights[0])
    body = torch.nn.functional.linear(torch.nn.functional.gelu(body, approximate="tanh"), weights[2])
    torch.testing.assert_close(out[0], torch.nn.functional.layer_norm(x + body, (8,), eps=1e-12))
    assert torch.equal(*out)


def test_sources_are_found():
    folder = build.source_folder()
    assert folder is not None
    assert (Path(folder) / "activations.h").is_file()


def test_installing_again_leaves_running_processes_their_library(tmp_path, monkeypatch):
    """A library written over while a process runs on it ends that process with a bus error."""
    setuptools = pytest.importorskip("setuptools", reason="the build script needs setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    script = runpy.run_path(str(Path(build.__file__).parents[1] / "setup.py"))
    command = script["BuildNative"](setuptools.Distribution())
    monkeypatch.setitem(command.copy_extensions_to_source.__func__.__globals__, "ROOT", tmp_path / "source")
    command.build_lib = str(tmp_path / "built")
    for folder in ("source", "built"):
        (tmp_path / folder / "kernels").mkdir(parents=True)
    library = tmp_path / "source" / "kernels" / "_ffnas_cpu.so"
    library.write_bytes(b"old library")
    (tmp_path / "built" / "kernels" / library.name).write_bytes(b"new")
    with library.open("rb") as running:
        command.copy_extensions_to_source()
        assert running.read() == b"old library"
    assert library.read_bytes() == b"new"
    assert [p.name for p in library.parent.iterdir()] == [library.name]


def test_kernels_serve_a_user_without_home_and_name(tmp_path):
    """A container's user number: no HOME, no entry among the users, and no compiler, so that the reference serves."""
    code = (
        "import pwd\n"
        "def nobody(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = nobody\n"
        "import torch, kernels; from kernels import build; build.LIBRARY_NAME = 'absent.so'\n"
        "print(kernels.FusedFFN(8, 4, 'linear(relu(linear(x,wb1)),wb2)')(torch.ones(2, 8)).shape)\n"
    )
    names = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "FFNAS_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {"TMPDIR": str(tmp_path), "CXX": str(tmp_path / "none")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 8])\n"
    assert "no C++ compiler found" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / f"ffnas-home-{os.getuid()}"]
