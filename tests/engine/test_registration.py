"""`import engine` is quick and makes transformers know the models, whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from encoder_reference import small_config

from engine.student import FFNASForSequenceClassification

LOAD = (
    "from transformers import AutoModelForSequenceClassification as A; "
    "m = A.from_pretrained({folder!r}); assert type(m).__name__ == 'FFNASForSequenceClassification'; "
)
ORDERS = {
    "lazily": (
        "import sys, engine, engine.errors, engine.architecture.params; "
        "assert not {{'torch', 'transformers'}} & set(sys.modules), 'import engine must stay light'; "
        "from transformers import AutoConfig; "
        "assert type(AutoConfig.from_pretrained({folder!r})).__name__ == 'FFNASConfig'; "
        "assert 'transformers.modeling_utils' not in sys.modules; " + LOAD
    ),
    "transformers first": "import transformers.models.auto.modeling_auto; import engine; " + LOAD,
    "model module first": "from engine.student.modeling import FFNASModel; " + LOAD,
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Every order in a fresh interpreter, two at a time: each imports transformers, which takes seconds."""
    folder = tmp_path_factory.mktemp("model")
    FFNASForSequenceClassification(small_config()).save_pretrained(folder)
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(code: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code.format(folder=str(folder))]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ORDERS, pool.map(run, ORDERS.values()), strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_models_load_after_import_engine(order, outcomes):
    assert outcomes[order].returncode == 0, outcomes[order].stderr[-2000:]


def test_installing_twice_changes_nothing():
    from engine.registration import install

    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
