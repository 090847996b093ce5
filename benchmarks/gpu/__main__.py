"""One family of GPU measurements, or the report of measurements made before.

    python -m benchmarks.gpu FAMILY --out FOLDER [--full]     one family; FOLDER/results.jsonl gets a line per case
    python -m benchmarks.gpu FAMILY --out FOLDER --rehearse   the same code on a CPU, tiny; no measurement
    python -m benchmarks.gpu --show FOLDER                    print a folder's results as Markdown
    python -m benchmarks.gpu --readme FOLDER                  put the table of a folder's results into README

`python -m benchmarks.gpu_check` runs all families, each with a limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.gpu import records, report
from benchmarks.gpu.scale import DEVICE, REHEARSAL, Scale

README = Path(__file__).resolve().parents[2] / "README.md"
FAMILIES = {
    "machine": ("machine", "run"), "compile": ("warm", "run"), "accuracy": ("accuracy", "run"),
    "kernels": ("launches", "kernels"), "ffn": ("ffn", "run"), "tiles": ("launches", "tiles"),
    "checks": ("checks", "run"), "steps": ("steps", "run"),
}  # fmt: skip
"""Family -> module of this package, and its function."""


def family(name: str) -> Callable[[records.Records, Scale, Path], None]:
    """The function that runs a family; imported when it is wanted."""
    module, function = FAMILIES[name]
    return getattr(import_module(f"benchmarks.gpu.{module}"), function)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", nargs="?", choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--full", action="store_true", help="every expression, and the autotuned torch.compile")
    parser.add_argument("--rehearse", action="store_true", help="run the code on a CPU; the result is marked a stub")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="print a folder's results as Markdown")
    parser.add_argument("--readme", type=Path, metavar="FOLDER", help="put a result's table into README")
    args = parser.parse_args(argv)
    if args.show or args.readme:
        return _printed(args.show or args.readme, into_readme=args.readme is not None)
    if args.family is None or args.out is None:
        print("benchmarks.gpu: name a family and --out FOLDER, or --show or --readme FOLDER", file=sys.stderr)
        return 2
    if not args.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device, or a PyTorch without CUDA; --rehearse runs on a CPU", file=sys.stderr)
        return 2
    scale = replace(REHEARSAL if args.rehearse else DEVICE, full=args.full)
    family(args.family)(records.Records(args.out / records.NAME, args.family), scale, args.out)
    return 0


def _printed(folder: Path, *, into_readme: bool) -> int:
    option, file = "--readme" if into_readme else "--show", folder / records.NAME
    lines = records.read(file)
    if not lines:
        print(f"{option}: no results in {file}: make some with `python -m benchmarks.gpu_check`", file=sys.stderr)
        return 2
    if not into_readme:
        print(report.markdown(lines))
        return 0
    try:
        report.into_readme(lines, README)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
