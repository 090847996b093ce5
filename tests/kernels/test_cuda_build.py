"""nvcc: every kernel compiles for both architectures, without spills or stack; one build serves all that come after."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from kernels.build import BuildError, source_folder
from kernels.cuda import build, library

STAND_IN = """#!/bin/sh
echo "$@" >> {log}
[ "$1" = "--version" ] && {{ echo "stand-in nvcc"; exit 0; }}
{rule}
while [ $# -gt 1 ]; do [ "$1" = "-o" ] && echo compiled > "$2"; shift; done
exit 0
"""
LOG = """ptxas info    : Compiling entry function '_Z3onev' for 'sm_80'
ptxas info    : Function properties for _Z3onev
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : Compiling entry function '_Z3twov' for 'sm_90a'
ptxas info    : Function properties for _Z3twov
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Installs a stand-in nvcc and an empty cache; returns a function that reads the calls made so far."""
    log = tmp_path / "calls.txt"

    def install(rule=""):
        home = tmp_path / "bin"
        home.mkdir()
        nvcc = home / "nvcc"
        nvcc.write_text(STAND_IN.format(log=log, rule=rule))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(build, "LIBRARY_NAME", "absent.so")
        return lambda: log.read_text().splitlines() if log.exists() else []

    return install


def test_built_once_for_both_architectures(stand_in, capsys):
    calls = stand_in()
    first = build.library_path()
    made = calls()
    compiled = [c for c in made if " -c " in c]
    assert len(compiled) == len(build.source_files(source_folder()))
    assert all("code=sm_80" in c and "code=sm_90a" in c for c in compiled)
    assert build.library_path() == first
    assert [c for c in calls()[len(made) :] if " -c " in c] == []
    assert "CUDA kernels" in capsys.readouterr().err
    assert build.ptxas_log(first) == ""


def test_errors_of_nvcc_are_told(stand_in):
    stand_in('case "$*" in *rows.cu*) echo "rows.cu(7): error: no such thing" >&2; exit 1;; esac')
    with pytest.raises(BuildError, match="no such thing"):
        build.library_path()


def test_flags_are_part_of_the_key(monkeypatch):
    plain = build.source_key(source_folder())
    monkeypatch.setenv("FFNAS_NVCCFLAGS", "-lineinfo")
    assert build.source_key(source_folder()) != plain


def test_without_nvcc_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "LIBRARY_NAME", "absent.so")
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="install the CUDA toolkit"):
        build.library_path()


def test_reports_are_read():
    one, two = build.kernel_reports(LOG)
    assert one == build.KernelReport("_Z3onev", "sm_80", 40, 16, 8, 4)
    assert two == build.KernelReport("_Z3twov", "sm_90a", 24, 0, 0, 0)


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The real library; built once per source into the cache, which takes a minute or two."""
    if build.find_nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    return build.library_path()


@pytest.mark.timeout(600)
def test_no_kernel_spills(compiled):
    reports = build.kernel_reports(build.ptxas_log(compiled))
    assert {r.architecture for r in reports} == {"sm_80", "sm_90a"}
    names = {r.name for r in reports}
    for kernel in ("rows_fwd", "rows_bwd", "column_sums", "grouped_fwd", "grouped_bwd", "weights", "grouped_sums"):
        assert any(kernel in name for name in names), kernel
    assert [r for r in reports if r.stack or r.spill_stores or r.spill_loads] == []
    assert max(r.registers for r in reports) <= 255


def test_library_speaks_this_interface(compiled):
    """Loads without a device; launching is what needs one."""
    opened = library.open_library(compiled)
    opened.ffnas_cuda_build_key.restype = ctypes.c_char_p
    assert opened.ffnas_cuda_build_key().decode() == build.source_key(source_folder())
    assert opened.ffnas_rows_shared(540, 4, 0, 1) < 64 * 1024
    bfloat16 = 1
    region = 64 * 2 * (544 + 8) * 2  # two operands of 64 rows and 540 columns
    assert opened.ffnas_grouped_fwd_shared(bfloat16, 64, 4, region) <= 227 * 1024
    assert opened.ffnas_grouped_bwd_shared(bfloat16, 64, 4, region) <= 227 * 1024
    assert opened.ffnas_grouped_fwd_shared(bfloat16, 48, 4, region) == -1
