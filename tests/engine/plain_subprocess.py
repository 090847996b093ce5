"""Runs Python as on a machine that has torch and transformers but not ffnas: another folder, no PYTHONPATH, and an
import system that does not find ffnas' packages and its optional libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys

GUARD = """
import sys
class Without:
    NAMES = {"engine", "kernels", "search", "triton", "onnx", "onnxruntime", "onnxscript", "datasets", "optuna"}
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.NAMES else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def run_plain(script, folder, *arguments):
    """The JSON value the script prints last."""
    dropped = ("PYTHONPATH", "FFNAS_CACHE")
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "OMP_NUM_THREADS": "1",
    }
    (folder / "empty").mkdir(exist_ok=True)
    result = subprocess.run(
        [sys.executable, "-c", GUARD + script, *map(str, arguments)],
        cwd=folder / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])
