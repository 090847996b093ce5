"""The benchmark of the block library, with a tiny teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import make_inputs

from benchmarks.inherit_library import measure, show


def test_library_and_latencies_are_measured_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("FFNAS_CACHE", str(tmp_path / "cache"))
    make_inputs(tmp_path)
    given = {
        "teacher": tmp_path / "teacher",
        "data.train": tmp_path / "train.csv",
        "data.dev": tmp_path / "dev.csv",
        "data.max_length": 16,
        "data.min_held_out": 20,
        "finetune.max_steps": 2,
        "inherit.calibration_tokens": 100,
        "inherit.score_tokens": 100,
        "precision": "fp32",
        "teacher_precision": "fp32",
    }
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    result = measure(tmp_path / "run", [1.2], options)
    assert result["layers"] == 2
    assert result["variants"] >= 10
    assert result["seconds"] > 0
    assert result["latency"]
    for row in result["latency"]:
        assert 0 < row["predicted_ms"] <= row["allowed_ms"] * 1.001
        assert row["measured_ms"] > 0


@pytest.mark.parametrize(("measured", "word"), [(2.19, "met"), (2.21, "missed")])
def test_ten_percent_above_is_the_most(measured, word):
    row = {"speedup": 4.0, "layers": [0], "allowed_ms": 2.0, "predicted_ms": 1.9, "measured_ms": measured}
    result = {"environment": {}, "layers": 6, "variants": 26, "scored": 13, "latency": [row], "speedups": [4.0, 9.0]}
    said = show({**result, "seconds": 61.0, "processor_seconds": 60.0})
    assert f"({word})" in said
    assert "above 60 s" in said
    assert "speed-up 9: no student" in said
    assert "within 60 s" in show({**result, "seconds": 60.0, "processor_seconds": 60.0})
