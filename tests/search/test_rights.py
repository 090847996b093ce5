"""Results belong to whom the umask says: every file of a run, of its model and of the cache follows it."""

import pytest
from fault_runs import options


@pytest.mark.parametrize("mask", [0o022, 0o077], ids=oct)
def test_a_finished_run_follows_the_mask(nursery, folder, tmp_path, mask):
    argv = [*options(folder, tmp_path / "runs", "a"), "--tracker", "tensorboard"]
    ended = nursery.run(argv, tmp_path / "cache", inject=f"mask:{mask:o}", plots=True)
    assert ended.code == 0, ended.err
    found = {p: p.stat().st_mode & 0o777 for place in ("runs", "cache") for p in (tmp_path / place).rglob("*")}
    names = {path.name for path in found}
    assert {"model.safetensors", "config.json", "study.db", "log.jsonl", "report.html", ".lock"} <= names
    assert any("tfevents" in name for name in names)
    wanted = {p: (0o777 if p.is_dir() else 0o666) & ~mask for p in found}
    assert {str(p): oct(m) for p, m in found.items() if m != wanted[p]} == {}
