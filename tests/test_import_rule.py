"""Imports point one way only: search -> engine -> kernels; found by reading every file, lazy imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"kernels": ("engine", "search"), "engine": ("search",), "csrc": ("kernels", "engine", "search")}


def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Absolute names of all modules `path` imports anywhere (also inside functions, also by `import_module("...")`)."""
    found = []
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            found.append((".".join((*base, *filter(None, [node.module]))), node.lineno))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                found.append((node.args[0].value, node.lineno))
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_point_downwards(folder):
    broken = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(folder)
        for name, line in imported_modules(path)
        if name.split(".")[0] in FORBIDDEN[folder]
    ]
    assert not broken, "\n".join(broken)


def test_the_walk_sees_lazy_and_relative_imports(tmp_path, monkeypatch):
    """Guards the guard: a forbidden import hidden in a function is found."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "kernels" / "sub" / "a.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import importlib\n"
        "def f():\n    from engine.params import ModelShape\n    importlib.import_module('search.space')\n"
        "from .. import operators\nfrom .b import c\n"
    )
    assert [name for name, _ in imported_modules(file)] == [
        "importlib", "kernels", "kernels.sub.b", "engine.params", "search.space",
    ]  # fmt: skip


def test_every_package_is_walked():
    assert all(sources(folder) for folder in ("kernels", "engine", "search"))
