"""The list in mutations.py names text and tests that are there; running it takes minutes (`make mutations`)."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, REPO


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.what for m in MUTATIONS])
def test_a_protection_and_its_test_are_where_the_list_says(mutation):
    assert (REPO / mutation.file).read_text().count(mutation.old) == 1
    file, _, name = mutation.test.partition("::")
    assert f"def {name or 'test_'}" in (REPO / file).read_text()
