"""Modules of generated Triton source: written to `<cache>/triton/generated/`, then imported.

Triton reads a function's source from its file, so generated functions need one. A file that is there already is used
only if it holds exactly what would be written.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType

from kernels.cache import cache_dir


def load_module(name: str, text: str) -> ModuleType:
    """The module `name` with the source `text`.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = cache_dir() / "triton" / "generated" / f"{name}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
