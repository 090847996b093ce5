"""Imports point one way only, found by reading every file, lazy imports included.

search -> engine -> kernels between the packages; inside each, no circle between rooms (folders, and files at the
package's top), and none between files anywhere.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("search", "engine", "kernels")
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
        "def f():\n    from engine.architecture.params import ModelShape\n    importlib.import_module('search.space')\n"
        "from .. import operators\nfrom .b import c\n"
    )
    assert [name for name, _ in imported_modules(file)] == [
        "importlib", "kernels", "kernels.sub.b", "engine.architecture.params", "search.space",
    ]  # fmt: skip


def test_every_package_is_walked():
    assert all(sources(folder) for folder in ("kernels", "engine", "search"))


def module_of(path: Path) -> str:
    """Dotted name of a source file; a package's is that of its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_imported(path: Path, modules: Collection[str]) -> set[str]:
    """Those of `modules` that `path` imports; `from a import b` means the module `a.b` where there is one."""
    found = {name for name, _ in imported_modules(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            if inside <= set(modules):
                found.discard(node.module)
            found |= inside
    return found & set(modules)


def room_of(module: str) -> str:
    """A folder of a package is one room with all below it, and so is each file at a package's top."""
    return ".".join(module.split(".")[:2])


def imports_between(folders: tuple[str, ...], place: Callable[[str], str]) -> dict[str, set[str]]:
    """Places and the places they import from, without a package's own `__init__`, which only names its contents."""
    files = {module_of(path): path for folder in folders for path in sources(folder)}
    edges: dict[str, set[str]] = {place(module): set() for module in files}
    for module, path in files.items():
        if path.name == "__init__.py" and module in folders:
            continue
        for name in modules_imported(path, files):
            if place(name) != place(module) and name not in folders:
                edges[place(module)].add(place(name))
    return edges


def circles(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports per line, as `a -> b -> a`; none where there are none."""
    sorter = TopologicalSorter(edges)
    try:
        sorter.prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_circle_of_rooms(folder):
    """Whoever goes from room to room along imports never comes back."""
    assert not circles(imports_between((folder,), room_of))


def test_no_circle_of_files():
    assert not circles(imports_between(PACKAGES, str))


def test_a_circle_is_found():
    """Guards the guard."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_package_shows_few_things_at_its_top(folder):
    """A newcomer can take in 16 files and 12 folders."""
    shown = [p for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    folders = [p for p in shown if p.is_dir()]
    assert len(folders) <= 12, sorted(p.name for p in folders)
    assert len(shown) - len(folders) <= 16, sorted(p.name for p in shown)
