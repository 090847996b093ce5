"""Uses an installed wheel from an empty folder (`make wheel-check`); fails with an assertion where something is off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import engine
import kernels
import search
from engine.export.native import write_native
from engine.student import FFNASConfig, FFNASForSequenceClassification
from kernels.build import library_path
from kernels.runtime import Session

HOME = Path(sys.prefix).resolve()


def main() -> None:
    """Packages and library from the wheel, presets and templates among its data, commands, and the runtime."""
    for package in (kernels, engine, search):
        assert HOME in Path(package.__file__).resolve().parents, f"{package.__file__} is not the wheel's"
    assert HOME in library_path().resolve().parents, f"{library_path()}: the wheel has no library, or of other sources"
    lines = [f"{word} {number},{label}" for number in range(30) for word, label in (("good", 1), ("bad", 0))]
    Path("rows.csv").write_text("\n".join(["text,label", *lines]), encoding="utf-8")
    for words in (["presets"], ["search", "--help"], ["doctor"], ["data", "rows.csv"]):
        done = subprocess.run([HOME / "bin" / "ffnas", *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout, words
    config = FFNASConfig(hidden_size=24, num_attention_heads=4, num_hidden_layers=2, vocab_size=50, embedding_size=8)
    model = FFNASForSequenceClassification(config).eval()
    write_native(model, None, "native")
    ids = np.arange(5, 17).reshape(2, 6)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(Session("native", threads=1).run(ids), expected, atol=1e-5)
    print(f"the wheel works: {Path(kernels.__file__).parent}")


if __name__ == "__main__":
    main()
