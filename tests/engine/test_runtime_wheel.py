"""The runtime's own wheel: NumPy, tokenizers and itself in a folder, and nothing else of ffnas or PyTorch."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from native_models import build
from transformers import BertTokenizerFast

from engine.export.native import write_native
from kernels.build import BuildError
from kernels.runtime import Session, wheel

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def test_it_answers_from_a_folder_without_pytorch(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"), model_max_length=40)
    write_native(build("mean", vocab_size=len(WORDS)), tokenizer, tmp_path / "model")
    made = wheel.write_wheel(tmp_path / "out")
    assert made.name.startswith("ffnas_runtime-")
    assert "-py3-none-" in made.name
    target = tmp_path / "packages"
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--target"]
    subprocess.run([*command, str(target), str(made)], check=True, capture_output=True)
    for name in ("numpy", "tokenizers"):
        origin = Path(find_spec(name).origin).parent
        for found in [origin, *origin.parent.glob(f"{name}.libs")]:
            (target / found.name).symlink_to(found)
    code = (
        "import sys\nfrom ffnas_runtime import Session\n"
        f"session = Session({str(tmp_path / 'model')!r}, threads=1)\n"
        "print(session('a b c')[0]['score'], 'numpy' in sys.modules, session.embed('a b c').shape)\n"
        "assert not {'torch', 'kernels', 'engine', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(  # -S: the environment's own packages are out of reach
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    score, numpy_first, *shape = done.stdout.split(maxsplit=2)
    assert float(score) == pytest.approx(Session(tmp_path / "model", threads=1)("a b c")[0]["score"], abs=1e-6)
    assert numpy_first == "False"  # a first answer does not wait for it
    assert shape == ["(1, 36)\n"]


def test_without_a_library_one_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse():
        raise BuildError("no C++ compiler found: install g++")

    monkeypatch.setattr(wheel, "library_path", refuse)
    assert wheel.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "ffnas: no C++ compiler found: install g++\n"
    assert not (tmp_path / "out").exists()
