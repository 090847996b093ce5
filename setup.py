"""Build script: adds the C++ and CUDA kernels to what pyproject.toml declares.

The libraries are built by `kernels.build` and `kernels.cuda.build` and placed beside the package's modules; the CUDA
one where there is nvcc and PyTorch is a CUDA build, whether or not there is a device (FFNAS_CUDA=1 or 0 decides
otherwise): a CPU build of PyTorch has no CUDA tensors, and nvcc takes two minutes. What cannot be built (no compiler,
say) is left out and the installation goes on: the first use tries again and says what is missing. Wheels carry the
sources as `kernels/_csrc` for that.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from kernels import build as native  # noqa: E402 - standard library only, needs no torch
from kernels.cuda import build as cuda  # noqa: E402 - likewise

LIBRARIES = {"_ffnas_cpu": native.LIBRARY_NAME, "_ffnas_cuda": cuda.LIBRARY_NAME}


def wants_cuda() -> bool:
    """Whether to build the CUDA kernels now."""
    choice = os.environ.get("FFNAS_CUDA")
    if choice is not None:
        return choice == "1"
    try:
        import torch
    except ModuleNotFoundError:  # an isolated build: the first use builds them
        return False
    return torch.version.cuda is not None


class BuildNative(build_ext):
    """Builds `kernels/_ffnas_cpu.so` and `kernels/_ffnas_cuda.so`, plain C libraries rather than Python modules."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ext.name == "kernels._ffnas_cuda":
            if not wants_cuda():
                return
            what, compiler, build_library = "CUDA kernels", cuda.find_nvcc(), cuda.build_library
        else:
            what, compiler, build_library = "CPU kernels", native.find_compiler(), native.build_library
        if compiler is None:
            print(f"ffnas: no compiler found, the {what} are not built now", file=sys.stderr)
            return
        print(f"ffnas: building the {what} with {compiler}", file=sys.stderr)
        try:
            build_library(target, ROOT / "csrc", compiler)
        except native.BuildError as error:
            print(f"ffnas: {error}; the {what} are not built now", file=sys.stderr)

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1], LIBRARIES[fullname.split(".")[-1]]))

    def copy_extensions_to_source(self) -> None:
        """Editable installations: the libraries go straight into the source folder, if they were built.

        Renamed into place: written over, they would end a process that runs on them (bus error).
        """
        for name in LIBRARIES.values():
            built = Path(self.build_lib) / "kernels" / name
            if built.exists():
                aside = ROOT / "kernels" / f"{name}.{os.getpid()}.tmp"
                shutil.copyfile(built, aside)
                aside.replace(ROOT / "kernels" / name)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class BuildPython(build_py):
    """Copies csrc into the wheel."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "kernels" / "_csrc"
            shutil.rmtree(target, ignore_errors=True)  # of an earlier build, whose files may be gone from csrc
            shutil.copytree(ROOT / "csrc", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(
    ext_modules=[Extension(f"kernels.{name}", sources=[]) for name in LIBRARIES],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
