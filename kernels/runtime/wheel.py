"""Makes a wheel of this folder alone, `ffnas_runtime`: no PyTorch, no compiler, NumPy and tokenizers.

    python -m kernels.runtime.wheel OUT          prints the wheel's path

In it are these files, the compiled library (kernels of every instruction set that the compiler knows) and the C header.
It runs on this operating system and family of processors, with any Python that ffnas supports.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from kernels.build import BuildError, library_path, source_folder

from .library import LIBRARY

PACKAGE = "ffnas_runtime"
_PROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "ffnas-runtime"
version = "{version}"
description = "Small encoders on a CPU without PyTorch: models exported by ffnas in, answers out"
requires-python = ">=3.10"
license = "Apache-2.0"
dependencies = ["numpy>=1.26", "tokenizers>=0.20"]

[tool.setuptools]
packages = ["{package}"]

[tool.setuptools.package-data]
{package} = ["*.so", "*.h"]
"""
_SETUP = """from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel


class Compiled(Distribution):
    def has_ext_modules(self):
        return True


class AnyPython(bdist_wheel):  # the library is plain C: of one system, but of no Python version
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(distclass=Compiled, cmdclass={"bdist_wheel": AnyPython})
"""


def write_wheel(folder: Path) -> Path:
    """Writes the wheel into `folder`, over one of the same name.

    Raises:
        BuildError: the library cannot be built, or pip or setuptools cannot make the wheel; one line says why.
    """
    library, sources = library_path(), source_folder()
    if sources is None:
        raise BuildError("the C header is not part of this installation: reinstall ffnas")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        root, package = Path(made), Path(made) / PACKAGE
        package.mkdir()
        for file in Path(__file__).parent.glob("*.py"):
            if file != Path(__file__):
                shutil.copyfile(file, package / file.name)
        shutil.copyfile(library, package / LIBRARY)
        shutil.copyfile(sources / "ffnas_encoder.h", package / "ffnas_encoder.h")
        (root / "pyproject.toml").write_text(_PROJECT.format(version=version("ffnas"), package=PACKAGE))
        (root / "setup.py").write_text(_SETUP)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(root / "out"), str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list((root / "out").glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no wheel was made"]
            raise BuildError(f"pip cannot make the wheel: {lines[-1].strip()}")
        return Path(shutil.copy(wheels[0], folder))


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 2 and one line where there is no wheel."""
    parser = argparse.ArgumentParser(prog="python -m kernels.runtime.wheel", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the wheel; made where it is missing")
    try:
        print(write_wheel(parser.parse_args(arguments).out))
    except (BuildError, OSError) as error:
        print(f"ffnas: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
