"""The ten likeliest mistakes of somebody new: each ends in one line that says what to do."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fault_runs import make_inputs, options, write_task

from search.cli import main

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("newcomer")
    make_inputs(folder)
    return folder


@pytest.fixture
def refused(inputs, tmp_path, monkeypatch, capsys):
    """Runs `ffnas search` in this process; gives the one line it ended with. Nothing may have been written."""
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: str, code: int = 2) -> str:
        capsys.readouterr()
        assert main(["search", *options(inputs, tmp_path / "runs", "run"), *arguments]) == code
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1, message
        assert not (tmp_path / "runs" / "run").exists()
        return message

    return run


def with_labels(path: Path, label) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        writer.writerows([f"the phone number {n} is great", label(n)] for n in range(80))
    return path


def test_1_a_wrong_teacher_path(refused):
    message = refused("--teacher", "modles/bert")
    assert "teacher 'modles/bert' not found: no folder 'modles/bert'" in message
    assert "give a folder, or go online once" in message


def test_2_pytorch_without_cuda_on_a_gpu_node(refused, monkeypatch, capsys):
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("search.console.environment.shutil.which", lambda name: f"/usr/bin/{name}")
    assert "install a CUDA build and driver" in refused("--device", "cuda")
    from search.console.environment import unused_gpu

    assert "is built without CUDA, so the CPU is used: install a CUDA build" in unused_gpu()


def test_3_no_compiler(tmp_path):
    """The run goes on in plain PyTorch; one line says why it is slow and what to install."""
    code = (
        "import sys, warnings, torch\n"
        "import kernels.build as build\n"
        "build.LIBRARY_NAME = 'absent.so'\n"
        "from search.cli import guarded\n"
        "from kernels import fused_ffn\n"
        "def command(_):\n"
        "    x, w, b = torch.randn(3, 4), torch.randn(4, 4), torch.zeros(4)\n"
        "    for _ in range(2):\n"
        "        fused_ffn(x, w, b, w, b, b, b, 'linear(gelu(linear(x,wb1)),wb2)')\n"
        "sys.exit(guarded(command, []))\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "FFNAS_CACHE": str(tmp_path), "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("ffnas: backend 'cpu' not used: no C++ compiler found")
    assert "install g++" in done.stderr


def test_4_an_old_pytorch(refused, monkeypatch):
    import search.console.environment

    version = search.console.environment.metadata.version
    old = {"torch": "2.4.1+cu121"}
    monkeypatch.setattr(search.console.environment.metadata, "version", lambda name: old.get(name) or version(name))
    message = refused()
    assert 'torch 2.4.1+cu121 is too old, ffnas needs 2.11 or later: run `pip install -U "torch>=2.11"`' in message


def test_5_hugging_faces_package_kernels(tmp_path):
    """In front of ours on the path, as after `pip install kernels` with ffnas's folder elsewhere."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.18.2'\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    code = "import sys; sys.path.remove(''); from search.cli import main; sys.exit(main(['search']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Hugging Face's package `kernels` is found where ffnas's own should be: run `pip uninstall" in done.stderr


def test_6_a_tokenizer_of_another_model(refused, inputs, tmp_path):
    import shutil

    from transformers import BertTokenizerFast

    shutil.copytree(inputs / "teacher", tmp_path / "teacher")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(99))]))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "teacher")
    message = refused("--teacher", str(tmp_path / "teacher"))
    assert "its tokenizer knows 104 tokens, the model 23" in message


def test_7_labels_as_text_where_a_number_is_asked_for(refused, tmp_path):
    path = with_labels(tmp_path / "train.csv", lambda n: ("good", "bad")[n % 2])
    message = refused("--data.train", str(path), "--data.kind", "regression")
    assert "'label' is 'good', not a finite number: correct it, or choose --data.kind classification" in message


def test_8_one_class_only(refused, tmp_path):
    path = with_labels(tmp_path / "train.csv", lambda _: "good")
    assert "is 'good': classification needs two classes" in refused("--data.train", str(path))


def test_9_sequences_longer_than_the_teachers_positions(refused):
    message = refused("--data.max_length", "512")
    assert "512" in message
    assert "32" in message


def test_10_a_full_disk(refused, inputs, tmp_path, monkeypatch, capsys):
    import errno

    import engine.files

    def fsync(_handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(engine.files.os, "fsync", fsync)
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
    write_task(tmp_path / "train.csv", 240, seed=1)
    assert main(["search", *options(inputs, tmp_path / "runs", "run")]) == 4
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1, message
    assert message.endswith("No space left on device: free disk space; finished work is kept (--resume goes on)")
