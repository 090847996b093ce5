"""The runtime's threads (csrc/cpu/pool.h): every task once, nothing touched afterwards; under the thread sanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels import generate_header

CSRC = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
MAIN = r"""
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>
#include "pool.h"

struct Job {
  std::vector<int> times;  // how often each task ran; plain, so that the sanitizer sees unordered access
  std::atomic<int> running{0};
};

int main() {
  int wrong = 0;
  for (int threads : {1, 2, 3, 7}) {
    ffnas::Pool pool(threads);
    for (int job = 0; job < 1500; ++job) {
      Job here;
      here.times.assign(job % 23, 0);
      pool.run(job % 23, [](void* ctx, int64_t task) {
        auto* j = static_cast<Job*>(ctx);
        j->running.fetch_add(1);
        ++j->times[task];
        j->running.fetch_sub(1);
      }, &here);
      for (int n : here.times) wrong += n != 1;
      wrong += here.running.load() != 0;
      if (job % 100 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // workers go to sleep
    }
  }
  std::printf("%d\n", wrong);
  return 0;
}
"""


def built(folder: Path, *flags: str) -> Path | str:
    """The program, or what the compiler said."""
    (folder / "main.cpp").write_text(MAIN)
    program = folder / "program"
    own = (*flags, f"-I{CSRC}", generate_header.write(folder))
    command = ["c++", "-std=c++17", "-O1", "-g", *own, str(CSRC / "pool.cpp"), str(folder / "main.cpp")]
    done = subprocess.run([*command, "-pthread", "-o", str(program)], capture_output=True, text=True, check=False)
    return program if done.returncode == 0 else done.stderr[-2000:]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_every_task_runs_once(tmp_path):
    program = built(tmp_path)
    assert isinstance(program, Path), program
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "0"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_no_races(tmp_path):
    program = built(tmp_path, "-fsanitize=thread")
    if not isinstance(program, Path):
        pytest.skip("this compiler has no thread sanitizer")
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=300)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("the thread sanitizer does not run under this kernel's address randomization")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert done.stdout.strip() == "0"
