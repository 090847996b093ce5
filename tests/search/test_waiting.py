"""The wait policy of PyTorch's threads is set before PyTorch is loaded, unless the user chose one."""

import os
import subprocess
import sys

import pytest

from search.console.waiting import SPIN_COUNT, wait_briefly

CODE = """
import sys
from search.cli import guarded
def command(argv):
    assert "torch" not in sys.modules
    import os
    print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"))
sys.exit(guarded(command, []))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_users_choice_wins(given, expected):
    wait_briefly(given)
    assert given == expected


def test_commands_start_with_it_before_torch():
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [SPIN_COUNT, "None"]
