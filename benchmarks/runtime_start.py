"""How long `kernels.runtime` takes from nothing to its first answer, in fresh processes.

    python -m benchmarks.runtime_start FOLDER [--runs 15]

Wall and processor time in ms, medians and smallest, of the whole process and of its steps. What is measured is the
runtime's own wheel (`kernels.runtime.wheel`), with nothing of ffnas or PyTorch on the path.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from kernels.runtime.wheel import write_wheel

CODE = """
import json, sys, time
marks = [time.process_time()]
from ffnas_runtime import Session
marks.append(time.process_time())
session = Session(sys.argv[1], threads=1)
marks.append(time.process_time())
session("the battery lasts two days, great phone")
marks.append(time.process_time())
print(json.dumps(marks))
"""
STEPS = ("interpreter", "import", "open", "tokenizer and first answer")


def libraries(folder: Path) -> None:
    """Fills `folder` with the wheel and links to what it depends on."""
    with tempfile.TemporaryDirectory() as made:
        zipfile.ZipFile(write_wheel(Path(made))).extractall(folder)
    for name in ("numpy", "tokenizers"):
        (spec := find_spec(name)) and (folder / name).symlink_to(Path(spec.origin or "").parent)
    for extra in Path(find_spec("numpy").origin or "").parent.parent.glob("numpy.libs"):  # type: ignore[union-attr]
        (folder / extra.name).symlink_to(extra)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", help="a native folder with a tokenizer and a head for whole texts")
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as path:
        libraries(Path(path))
        walls, steps = [], []
        for _ in range(options.runs):
            began = time.perf_counter()
            command = [sys.executable, "-S", "-c", CODE, options.folder]
            done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, check=True)
            walls.append(1e3 * (time.perf_counter() - began))
            marks = [0.0, *json.loads(done.stdout)]
            steps.append([1e3 * (b - a) for a, b in pairwise(marks)])
    totals = [sum(s) for s in steps]
    print(f"wall {statistics.median(walls):.0f} (smallest {min(walls):.0f})")
    print(f"processor {statistics.median(totals):.0f} (smallest {min(totals):.0f})")
    for name, values in zip(STEPS, zip(*steps, strict=True), strict=True):
        print(f"  {name} {statistics.median(values):.0f} (smallest {min(values):.0f})")


if __name__ == "__main__":
    main()
