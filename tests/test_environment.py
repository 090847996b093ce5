"""docs/environment.md lists the variables that the code reads: all of them, and no others.

What is read is found in the source: a name handed to `os.environ` or `os.getenv`, written out or by a constant of the
module (or of the one it is imported from), and `getenv` in C++.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "environment.md"
READERS = ("kernels", "engine", "search", "benchmarks", "tests")
ROW = re.compile(r"^\| `(FFNAS_\w+)` \| (.+?) \| `([^`]+)` \| .+ \|$", re.MULTILINE)
OURS = re.compile(r"FFNAS_\w+")


def constants(tree: ast.Module) -> dict[str, str]:
    """Names that a module gives to texts, at its top."""
    return {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def imported(tree: ast.Module, root: Path) -> dict[str, str]:
    """Names of texts that a module imports from another of ours."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            path = root / (node.module.replace(".", "/") + ".py")
            if path.is_file():
                texts = constants(ast.parse(path.read_text(encoding="utf-8")))
                found |= {a.asname or a.name: texts[a.name] for a in node.names if a.name in texts}
    return found


def asked_for(node: ast.AST) -> ast.expr | None:
    """The name in `os.environ[name]`, `os.environ.get(name)`, `os.getenv(name)` or `name in os.environ`."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and is_environ(node.value):
        return node.slice
    if isinstance(node, ast.Compare) and any(is_environ(other) for other in node.comparators):
        return node.left
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        method = node.func
        reads = method.attr == "getenv" or (method.attr in ("get", "pop") and is_environ(method.value))
        return node.args[0] if reads else None
    return None


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def read_in(path: Path, root: Path = ROOT) -> set[str]:
    """Variables of ours that a Python file reads."""
    text = path.read_text(encoding="utf-8")
    if "environ" not in text and "getenv" not in text:
        return set()
    tree = ast.parse(text, filename=str(path))
    names = imported(tree, root) | constants(tree)
    found = set()
    for node in ast.walk(tree):
        asked = asked_for(node)
        if isinstance(asked, ast.Constant):
            found.add(asked.value)
        elif isinstance(asked, ast.Name):
            found.add(names.get(asked.id))
    return {name for name in found if isinstance(name, str) and OURS.fullmatch(name)}


def readers() -> dict[str, set[str]]:
    """Every variable that is read, with the files that read it."""
    found: dict[str, set[str]] = {}
    files = [path for folder in READERS for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, ROOT / "setup.py"]:
        for name in read_in(path):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    for path in (ROOT / "csrc").rglob("*.*"):
        for name in re.findall(r'getenv\("(FFNAS_\w+)"\)', path.read_text(encoding="utf-8")):
            found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
READ = readers()


def test_the_page_lists_what_is_read():
    assert {name for name, _, _ in ROWS} == READ.keys()
    assert len({name for name, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("name", "default", "file"), ROWS, ids=[row[0] for row in ROWS])
def test_the_file_named_reads_it(name, default, file):
    assert file in READ[name]
    assert default.strip()


def test_variables_set_for_others_are_read_by_somebody():
    """A name in Makefile, continuous integration or Dockerfile that nobody reads would do nothing."""
    places = [ROOT / "Makefile", ROOT / "Dockerfile", *(ROOT / ".ci").iterdir(), *(ROOT / ".github").rglob("*.yml")]
    named = {name for path in places if path.is_file() for name in OURS.findall(path.read_text(encoding="utf-8"))}
    assert named <= READ.keys()


def test_all_ways_of_reading_are_found(tmp_path):
    """Guards the guard."""
    (tmp_path / "other.py").write_text('FAR = "FFNAS_FAR"\n')
    file = tmp_path / "a.py"
    file.write_text(
        "import os\nfrom other import FAR\nNEAR = 'FFNAS_NEAR'\n"
        "os.environ['FFNAS_A'], os.environ.get('FFNAS_B', '1'), os.getenv('FFNAS_C'), 'FFNAS_D' in os.environ\n"
        "os.environ.get(NEAR), os.environ[FAR], os.environ.pop('FFNAS_E')\n"
        "os.environ['FFNAS_SET'] = '1'\nos.environ.get('HOME')\n"
    )
    assert read_in(file, tmp_path) == {f"FFNAS_{name}" for name in ("A", "B", "C", "D", "E", "NEAR", "FAR")}
