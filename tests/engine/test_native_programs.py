"""Native folders read by a C program (encoder_driver.c): under sanitizers, with hostile files, and on another processor
under emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from native_models import KINDS, build, inputs

from engine.export.native import write_native
from kernels import build as library
from kernels.runtime import Session
from kernels.runtime.library import UNIT, WANTED

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1", "-O1")
ARM = "aarch64-linux-gnu"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A native folder of every kind of model."""
    root = tmp_path_factory.mktemp("folders")
    for kind in KINDS:
        write_native(build(kind), None, root / kind)
    return root


def driver(target: Path, compiled: Path, compiler: str, *flags: str) -> Path:
    """The program, linked with a compiled library."""
    source = ROOT / "tests" / "engine" / "encoder_driver.c"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", *flags, f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(
        [*command, str(compiled), f"-Wl,-rpath,{compiled.parent}", "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return target


def output(*command: object, given: str | None = None, timeout: int = 280) -> str:
    done = subprocess.run(
        [str(c) for c in command], input=given, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    return done.stdout


def hostile(program: Path, folder: Path, work: Path, count: int, seed: int) -> tuple[int, int]:
    shutil.copytree(folder, work)
    refused, answered = map(int, output(program, "hostile", folder, work, count, seed).split())
    assert refused + answered == count
    return refused, answered


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return driver(tmp_path_factory.mktemp("native") / "driver", library.library_path(), "cc")


@pytest.mark.parametrize("kind", ["masks", "stacks"])
def test_any_pass_and_hostile_words_of_other_models(kind, folders, native, tmp_path):
    assert int(output(native, "mixed", folders / kind, 500, 5)) > 100
    refused, answered = hostile(native, folders / kind, tmp_path / "work", 1000, 5)
    assert refused > 400
    assert answered > 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_thousand_hostile_files(folders, native, tmp_path):
    each = 100_000 // len(KINDS) + 1
    for seed, kind in enumerate(KINDS):
        refused, answered = hostile(native, folders / kind, tmp_path / kind, each, seed + 100)
        print(f"{kind}: {refused} refused, {answered} answered")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The driver and the library, kernels of any processor alone, under AddressSanitizer and UBSan."""
    made = tmp_path_factory.mktemp("sanitized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FFNAS_CXXFLAGS", " ".join(SANITIZE))
        patch.setattr(library, "_X86_UNITS", ())
        patch.setattr(library, "_ARM_UNITS", ())
        library.build_library(made / "library.so", ROOT / "csrc", library.find_compiler() or "c++")
    return driver(made / "driver", made / "library.so", "cc", *SANITIZE)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sanitizers_find_nothing(folders, sanitized, tmp_path):
    """Every kind of model: passes of all shapes and wishes, wrong ones too, and hostile files; nothing leaks either."""
    for seed, kind in enumerate(KINDS):
        assert int(output(sanitized, "mixed", folders / kind, 200, seed)) > 20
        hostile(sanitized, folders / kind, tmp_path / kind, 500, seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which(f"{ARM}-g++") is None, reason=f"no {ARM}-g++ (package g++-{ARM})")
@pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None, reason="no qemu-aarch64-static (package qemu-user-static)"
)
def test_arm_gives_the_same_answers(folders, tmp_path):
    """Compiled for 64-bit Arm and run under emulation, beside this machine's answers; both sum in float32: 1e-5."""
    library.build_library(tmp_path / "library.so", ROOT / "csrc", f"{ARM}-g++")
    assert b"neon" in (tmp_path / "library.so").read_bytes()
    program = driver(tmp_path / "driver", tmp_path / "library.so", f"{ARM}-gcc")
    arm = ("qemu-aarch64-static", "-L", f"/usr/{ARM}", program)
    for kind in KINDS:
        session = Session(folders / kind, threads=1)
        wishes = ["head"] if session.answers.head != "none" else ["hidden", "pooled", "mean", "cls", "max"]
        cases, wanted = [], []
        for batch, length in ((1, 1), (1, 13), (3, 16), (5, 33)):
            ids, mask, types = inputs(batch, length)
            for wish in wishes:
                cases.append(f"{WANTED.index(wish)} {batch} {length} 0 " + numbers(ids, mask, types))
                wanted.append(session.run(ids, mask, types, wish).ravel())
        lines = output(*arm, "answers", folders / kind, 2, given="\n".join(cases)).splitlines()
        for line, exact in zip(lines, wanted, strict=True):
            found = np.array(line.split(), float)
            np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * max(1.0, np.abs(exact[exact > -1e4]).max()))
    assert int(output(*arm, "mixed", folders / "masks", 200, 3)) > 50


def numbers(*arrays: np.ndarray) -> str:
    return " ".join(str(v) for a in arrays for v in a.ravel().tolist())


def test_c_gives_chosen_tokens_and_vectors_of_length_one(folders, native):
    session = Session(folders / "masks", threads=1)
    ids, mask, types = inputs(2, 9)
    places = np.array([0, 3, 9])
    line = output(native, "answers", folders / "masks", 1, given=f"0 2 9 3 {numbers(ids, mask, types, places)}")
    exact = session._encoder.run_at(ids, mask.astype(np.uint8), types, places)
    np.testing.assert_allclose(np.array(line.split(), float), exact.ravel(), rtol=1e-6, atol=1e-6)
    what = WANTED.index("mean") + UNIT
    line = output(native, "answers", folders / "encoder", 1, given=f"{what} 2 9 0 {numbers(ids, mask, types)}")
    found = np.array(line.split(), float).reshape(2, -1)
    mean = Session(folders / "encoder", threads=1).run(ids, mask, types, "mean")
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)
