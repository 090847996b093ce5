"""Makes the students known to transformers' Auto classes, without importing transformers before somebody else does.

`install` puts a finder in front of the import system that acts when one of three modules has been imported (at once for
those that already are):

    transformers.utils                               switch off the probe for another package named `kernels`
    transformers.models.auto.configuration_auto      register FFNASConfig
    transformers.models.auto.modeling_auto           register the model classes

The modules of `engine.student` must not import the Auto classes themselves, or the third action would find them half
imported. Why not at once: docs/decisions/0022.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def install() -> None:
    """Acts on the modules already imported and watches for the others; more calls change nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport(_ACTIONS))
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action()


def _switch_off_probe() -> None:
    from engine.compat import disable_transformers_kernels_probe

    disable_transformers_kernels_probe()


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from engine.student.configuration import FFNASConfig

    AutoConfig.register(FFNASConfig.model_type, FFNASConfig, exist_ok=True)


def _register_models() -> None:
    from transformers.models.auto import modeling_auto as auto

    from engine import student
    from engine.data.task import heads

    of_tasks = dict.fromkeys(head.student_class() for head in heads())
    for model_class in (student.FFNASModel, *of_tasks, student.FFNASForMaskedLM):
        auto_class = getattr(auto, model_class.hand_over.auto)
        auto_class.register(student.FFNASConfig, model_class, exist_ok=True)


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.utils": _switch_off_probe,
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _AfterImport(MetaPathFinder):
    """Finds the watched modules with the other finders, and has an action run after each was executed."""

    def __init__(self, actions: dict[str, Callable[[], None]]) -> None:
        self._actions = actions
        self._local = threading.local()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._actions or getattr(self._local, "finding", False):
            return None
        self._local.finding = True  # `importlib.util.find_spec` asks this finder again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._local.finding = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ActingLoader(spec.loader, self._actions[fullname])
        return spec


class _ActingLoader(Loader):
    """A loader that runs an action after the module; everything else is the real loader's."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self._loader = loader
        self._action = action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._action()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
