"""`kernels` is our module name and also a distribution transformers looks for: each case in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTER = "from engine.compat import disable_transformers_kernels_probe as off; off(); off(); "
LOAD = "from transformers import BertConfig, BertModel; import transformers.integrations.hub_kernels as hub; "
CHECK = (
    "from transformers.utils import is_kernels_available as probe; assert probe() is False; "
    "import kernels; assert kernels.parse_expression('gelu(x)'); print('fine')"
)


def run_python(code: str, *, cwd: Path, extra_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    if extra_path is not None:
        env["PYTHONPATH"] = str(extra_path)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def hf_metadata(tmp_path: Path) -> Path:
    """A folder on the path which says that HF's `kernels` 0.18.5 is installed (metadata only)."""
    folder = tmp_path / "site" / "kernels-0.18.5.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    return folder.parent


def test_ours_alone_from_the_repository_root():
    done = run_python(ENTER + "import transformers.integrations.hub_kernels; " + CHECK, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
    assert "kernels" not in done.stderr


def test_ours_beside_hf_metadata_loads_models_and_warns_once_in_one_line(hf_metadata, tmp_path):
    seen = (
        "import transformers.utils, transformers.utils.import_utils as d; "
        # the danger is real where HF's version lies in the window of the installed transformers
        "assert d.is_kernels_available() or d.KERNELS_MIN_VERSION != '0.18.2'; "
    )
    done = run_python(seen + ENTER + LOAD + CHECK, cwd=tmp_path, extra_path=hf_metadata)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
    warned = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warned) == 1
    assert "`kernels` 0.18.5 is installed beside ffnas" in warned[0]
    assert "pip uninstall kernels" in warned[0]


def test_a_foreign_kernels_package_is_named_and_refused(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(tmp_path)!r}); {ENTER}"
    done = run_python(code, cwd=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert str(tmp_path / "kernels") in last
    assert "pip uninstall kernels" in last
