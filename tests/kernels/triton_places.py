"""Where tests of Triton kernels run: under the interpreter, in a process of its own, and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.dispatch import use_backend

INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRETER


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETER, reason="runs in a child process")),
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no CUDA device")]),
    ],
    ids=["interpreter", "gpu"],
    name="device",
)
def triton_device(request):
    """Where to run; the backend is demanded, and code is generated only where a test asks for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with use_backend("triton", strict=True):
        yield torch.device(request.param)
    torch.set_num_threads(threads)


def passes_under_the_interpreter(file: str) -> None:
    """Runs the interpreter's half of a test file in a child process."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", file]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
