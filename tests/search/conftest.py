"""What tests of whole searches share: a process that starts them, and a tiny teacher with its task."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import Nursery, make_inputs


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """Starts searches from a process that has loaded everything; one for each file of tests."""
    with Nursery() as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """train.csv, dev.csv and teacher/ (`fault_runs.make_inputs`)."""
    made = tmp_path_factory.mktemp("inputs")
    make_inputs(made)
    return made
