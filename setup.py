"""Build script: adds the C++ kernels to what pyproject.toml declares.

The library is built by `kernels.build` and placed beside the package's modules. Where it cannot be built (no compiler,
say) the installation goes on without it: the first use tries again and says what is missing. Wheels carry the C++
sources as `kernels/_csrc` for that.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from kernels import build as native  # noqa: E402 - standard library only, needs no torch


class BuildNative(build_ext):
    """Builds `kernels/_ffnas_cpu.so`, a plain C library rather than a Python module."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        compiler = native.find_compiler()
        if compiler is None:
            print("ffnas: no C++ compiler found, the CPU kernels are not built now", file=sys.stderr)
            return
        print(f"ffnas: building the CPU kernels with {compiler}", file=sys.stderr)
        try:
            native.build_library(target, ROOT / "csrc", compiler)
        except native.BuildError as error:
            print(f"ffnas: {error}; the CPU kernels are not built now", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], native.LIBRARY_NAME))

    def copy_extensions_to_source(self) -> None:
        """Editable installations: the library goes straight into the source folder, if it was built."""
        built = Path(self.build_lib) / "kernels" / native.LIBRARY_NAME
        if built.exists():
            shutil.copyfile(built, ROOT / "kernels" / native.LIBRARY_NAME)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class BuildPython(build_py):
    """Copies csrc into the wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "kernels" / "_csrc"
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    ext_modules=[Extension("kernels._ffnas_cpu", sources=[])],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
