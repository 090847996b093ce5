"""What the documentation names is there: files, names in them, links; and no room is missing from the map."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MAP = ROOT / "docs" / "architecture.md"
PLACES = re.compile(r"`((?:search|engine|kernels|csrc|tests|benchmarks)/[\w/.-]*)`")
BARE = re.compile(r"`(\w+\.(?:py|cpp|h|cuh?))`")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)[^)]*\)")
WHERE = re.compile(r"^\|[^|]+\| `([\w/]+\.py)` \| `(\w+)` \|$", re.MULTILINE)


def missing(text: str, root: Path = ROOT) -> list[str]:
    """Files and folders that a page names and that are not there; bare names belong to a folder of their paragraph."""
    found = []
    for block in re.split(r"\n(?=\n|[|\d-])", text):
        places = PLACES.findall(block)
        found += [place for place in places if "NAME" not in place and not (root / place).exists()]
        folders = [root / place if place.endswith("/") else (root / place).parent for place in places]
        if folders:
            found += [name for name in BARE.findall(block) if not any((f / name).exists() for f in folders)]
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "decisions"], ids=str)
def test_files_that_a_page_names_exist(page):
    """Decisions may speak of what was there before, or never came to be."""
    assert missing(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_between_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert [target for target in LINK.findall(text) if not (page.parent / target).exists()] == []


@pytest.mark.parametrize(("file", "name"), WHERE.findall(MAP.read_text(encoding="utf-8")))
def test_the_map_leads_to_what_it_says(file, name):
    body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    plain = {t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    assert name in plain | {getattr(node, "name", "") for node in body}


def test_every_room_is_on_the_map():
    rooms = {path.name for package in ("search", "engine", "kernels") for path in (ROOT / package).iterdir()
             if path.is_dir() and (path / "__init__.py").exists()}  # fmt: skip
    text = MAP.read_text(encoding="utf-8")
    assert [room for room in sorted(rooms) if not re.search(rf"\w/{room}\b", text)] == []


def test_code_refers_to_decisions_that_are_there():
    """By number; the index lists every page."""
    pages = {path.name[:4]: path for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md")}
    files = [path for folder in ("search", "engine", "kernels") for path in (ROOT / folder).rglob("*.py")]
    said = {n for path in files for n in re.findall(r"docs/decisions/(\d+)", path.read_text(encoding="utf-8"))}
    assert said <= pages.keys()
    index = (ROOT / "docs" / "decisions" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\((\d{4}-[\w-]+\.md)\)", index) == sorted(path.name for path in pages.values())


def test_pages_name_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    said = {t for page in PAGES for t in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert said - targets == set()


def test_both_forms_of_continuous_integration_do_the_same():
    make = re.compile(r"^\s*(?:- )?(?:run: )?make ([a-z-]+)", re.MULTILINE)
    here, there = (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml")
    found, others = (set(make.findall(path.read_text(encoding="utf-8"))) for path in (here, there))
    assert found == others
    assert "test" in found


def test_a_file_that_is_gone_is_noticed(tmp_path):
    """Guards the guard."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "a.py").touch()
    text = "See `engine/a.py` and `b.py`.\n\n`engine/c.py`\n\n| x | `engine/a.py`, `a.py` |"
    assert missing(text, tmp_path) == ["b.py", "engine/c.py"]
