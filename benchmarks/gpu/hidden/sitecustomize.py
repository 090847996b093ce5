"""Hides the packages named in FFNAS_HIDDEN from this process: as on a machine that lacks them.

Python imports a module of this name at its start; `benchmarks.gpu_check --dry-run` puts this folder on PYTHONPATH. The
packages are then neither importable nor found by `importlib.util.find_spec`, in child processes too.
"""

import os
import sys
from importlib.machinery import PathFinder

HIDDEN = frozenset(os.environ.get("FFNAS_HIDDEN", "").split(","))


class WithoutHidden(PathFinder):
    """The path finder, blind to the hidden packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        """None for a hidden package and its modules."""
        if fullname.partition(".")[0] in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutHidden
