"""The list in mutations.py names definitions, code and tests that are there; running it takes minutes."""

from __future__ import annotations

import ast

import pytest
from mutations import MUTATIONS, REPO, Change, changed

SOURCE = '''
LIMIT: int = 3


@cache(size=LIMIT)
def twice(): ...


class Reader:
    def read(self):
        """Reads."""
        if (self.sound and
                self.size < LIMIT):  # a comment
            yield 1
        return f"{LIMIT}\\n"


if LIMIT:
    def twice(): ...
'''


@pytest.fixture
def root(tmp_path):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/some.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.what for m in MUTATIONS])
def test_a_protection_and_its_test_are_where_the_list_says(mutation):
    path, text = changed(mutation.change, REPO)
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(path.read_text()))
    file, _, name = mutation.test.partition("::")
    assert f"def {name or 'test_'}" in (REPO / file).read_text()


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        (Change("LIMIT", "3", "1 << 30"), "LIMIT: int = 3", "LIMIT: int = 1 << 30"),
        (Change("Reader.read", "self.size<LIMIT", "a or b"), "self.size < LIMIT", "(a or b)"),
        (Change("Reader.read", "yield 1", "yield 2; return"), "yield 1\n", "yield 2\n            return\n"),
        (Change("Reader", "self . sound", "None"), "self.sound", "None"),
    ],
)
def test_layout_does_not_matter_and_the_rest_stays(root, change, old, new):
    path, text = changed(change, root)
    assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(SOURCE.replace(old, new)))
    assert path.read_text() == SOURCE


@pytest.mark.parametrize(
    ("name", "old", "message"),
    [
        ("Reader.write", "1", "Reader.write is defined 0 times"),
        ("twice", "LIMIT", "twice is defined 2 times .engine/some.py:6, engine/some.py:19"),
        ("Reader.read", "self.sound and self.size", "there 0 times"),
        ("Reader.read", "LIMIT", "there 2 times"),
    ],
)
def test_what_is_not_there_once_is_refused(root, name, old, message):
    with pytest.raises(SystemExit, match=message):
        changed(Change(name, old, "None"), root)
