"""The name `kernels`: keeping transformers' optional dependency of that name apart from our package.

transformers optionally imports the PyPI distribution `kernels` (Hugging Face's). It looks for a module of that name,
then for a version in the metadata, and imports from it when the version lies in its window (0.18.2 <= v < 0.19 for
transformers 5.23). Our package has the same module name, so with both distributions installed transformers would see
HF's version, import *our* package and fail. `disable_transformers_kernels_probe` answers the question for it: no.

Chosen: replace the probe function wherever it is already bound, before the first model module is imported; safe to
call many times, and harmless when nothing is wrong. Rejected: a fake module in `sys.modules` (would hide our own
package), and renaming the package (the name is part of the project's public interface).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path

_OURS = ("language/expression.py", "language/operators.py")
"""Files that tell our `kernels` package from another one of that name."""

_warned = False


def _unavailable(*_args: object, **_kwargs: object) -> bool:
    """Stands in for transformers' `is_kernels_available`."""
    return False


# torch.compile traces this as a constant, as it does the probe it replaces.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def disable_transformers_kernels_probe() -> None:
    """Make transformers treat Hugging Face's optional `kernels` distribution as absent.

    Call before the first import of a transformers model module; `import engine` does. Also warns, once and in one
    line, when HF's distribution is installed beside ours.

    Raises:
        ImportError: `import kernels` finds a package that is not ours, so nothing of ffnas could work.
    """
    _require_own_kernels()
    import transformers.utils as public
    import transformers.utils.import_utils as definition

    definition.is_kernels_available = _unavailable
    public.is_kernels_available = _unavailable
    for name, module in list(sys.modules.items()):  # names bound by `from ..utils import is_kernels_available`
        if name.startswith("transformers.") and "is_kernels_available" in getattr(module, "__dict__", {}):
            module.__dict__["is_kernels_available"] = _unavailable
    _warn_once_about_hf_kernels()


def hf_kernels_version() -> str | None:
    """Version of the installed Hugging Face distribution `kernels`, None when it is not installed."""
    try:
        return importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None


def _require_own_kernels() -> None:
    spec = importlib.util.find_spec("kernels")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    if not any(all((folder / file).is_file() for file in _OURS) for folder in folders):
        found = folders[0] if folders else "nothing"
        raise ImportError(
            f"`import kernels` finds {found}, not ffnas' package: uninstall the distribution `kernels` "
            "(`pip uninstall kernels`) and install ffnas again (`pip install -e .`)"
        )


def _warn_once_about_hf_kernels() -> None:
    global _warned
    version = hf_kernels_version()
    if version is None or _warned:
        return
    _warned = True
    warnings.warn(
        f"Hugging Face's distribution `kernels` {version} is installed beside ffnas, whose package has the same name: "
        "its hub kernels are switched off in this process (`pip uninstall kernels` silences this)",
        RuntimeWarning,
        stacklevel=3,
    )
