"""Several ranks: what they train, what they tell one another, and how they end.

Real processes connected by gloo, on the CPU. Two ranks train what one does; every scenario runs in
`parallel_worker.py`, once for all tests of this file, because starting a process costs more than training.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from parallel_worker import ToySupernet, train

from engine.seeding import seed_everything
from engine.training.parallel import ALONE, Ranks, join

REPO = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "parallel_worker.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(scenario: str, folder: Path, size: int = 2) -> list[subprocess.Popen]:
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPO),
    }
    line = [sys.executable, str(WORKER), scenario, str(folder)]
    return [
        subprocess.Popen(
            line, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True, cwd=REPO
        )
        for r in range(size)
    ]


def finish(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Folder of what two ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    codes, errors = finish(start("all_scenarios,messages,waiting,dead", folder))
    assert codes == [3, 9], "\n".join(errors)  # those of the last scenario; any other would have ended in 1
    return folder


def saved(folder: Path, name: str) -> dict:
    return torch.load(folder / f"{name}.pt", weights_only=True)


def assert_close(found: dict, model: ToySupernet) -> None:
    """float64 throughout: sums in another order differ by 1e-16, which twelve steps of AdamW amplify a little."""
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def test_two_ranks_train_what_one_does(trained: Path):
    model, losses = train()
    found = saved(trained, "plain")
    assert_close(found["model"], model)
    for ours, theirs in zip(found["losses"], losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_parameters_no_step_uses_stay_untouched(trained: Path):
    """Neither weight decay nor momentum moves them, in one process as in several."""
    seed_everything(7)
    before = ToySupernet().double().paths[3]
    for found in (saved(trained, "plain")["model"], train()[0].state_dict()):
        assert torch.equal(found["paths.3.weight"], before.weight)


def test_accumulated_micro_batches_train_what_the_whole_batch_does(trained: Path):
    whole, losses = train()
    for micro in (2, 3, 8):
        model, own = train(accumulate=micro)
        assert_close(model.state_dict(), whole)
        assert own[0] == pytest.approx(losses[0], rel=1e-9)
    assert_close(saved(trained, "accumulated")["model"], whole)


def test_a_second_phase_on_the_same_model_is_data_parallel_anew(trained: Path):
    model, _ = train()
    model, _ = train(model=model)
    assert_close(saved(trained, "twice")["model"], model)


def test_ranks_resume_bit_for_bit_with_dropout_and_micro_batches(trained: Path):
    undisturbed, resumed = saved(trained, "dropout")["model"], saved(trained, "resumed")["model"]
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name


def test_a_dead_rank_ends_the_others_at_once(trained: Path):
    told = (trained / "lost").read_text()
    assert told.startswith("lost contact with another rank (")
    assert ".cc" not in told
    assert len(told) < 120


def test_one_process_talks_to_itself():
    with join(cuda=False) as ranks:
        assert ranks is ALONE
    data = torch.arange(3, dtype=torch.uint8)
    assert ranks.first(lambda: 1) == ranks.agree(lambda: 1) == ranks.together(lambda: 1) == 1
    assert ranks.send(b"x") == b"x"
    assert ranks.gather(data)[0] is data
    model = torch.nn.Linear(2, 2)
    with ranks.data_parallel(model) as same:
        assert same is model
    assert Ranks(rank=1, size=2).is_first is False
