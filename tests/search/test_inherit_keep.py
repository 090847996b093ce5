"""`budget.keep`: which size of the ladder is found, how it is told, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "faults"))
from fault_runs import outcome, unfinished_files
from test_inherit import small

from engine.data import TaskSpec
from engine.errors import UserError
from search.config.options import parse
from search.inherit.keep import Rung, check_ladder, climb
from search.ledger.ledger import Ledger


def rungs(*early: float | None) -> list[Rung]:
    return [Rung(share=(k + 1) / 8, architecture=None, early=value) for k, value in enumerate(early)]


def climbed(early, late, keep=0.98) -> tuple[int, list[int]]:
    """The rung found, and those that were distilled, in order, where rung k ends at `late[k]`."""
    made, seen = rungs(*early), []

    def measure(rung: Rung) -> float:
        seen.append(made.index(rung))
        return late[made.index(rung)]

    return made.index(climb(made, keep, measure)), seen


CASES = {
    "the first promising one fails, the next holds": ([0.9, 0.97, 0.99], [0.9, 0.97, 0.985], 2, [1, 2]),
    "it holds, the one below does not": ([0.9, 0.97, 0.99], [0.9, 0.99, 0.995], 1, [1, 0]),
    "it holds, and so do all below": ([0.9, 0.95, 0.99], [0.99, 0.98, 0.99], 0, [2, 1, 0]),
    "none promises anything: the largest first": ([0.5, 0.5, 0.6], [0.5, 0.6, 0.99], 2, [2, 1]),
    "none holds: the closest": ([0.97, 0.97, 0.97], [0.9, 0.97, 0.96], 1, [0, 1, 2]),
    "of equally close ones the smallest": ([0.97, 0.97], [0.9, 0.9], 0, [0, 1]),
    "a failed one is not begun with": ([None, 0.97, 0.99], [0.9, 0.99, 0.99], 1, [1, 0]),
    "better than its teacher": ([1.01, 1.0], [1.02, 1.0], 0, [0]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_ladder_is_climbed_to_the_smallest_that_holds(case):
    early, late, found, order = CASES[case]
    assert climbed(early, late) == (found, order)


def test_what_is_short_is_halved_by_the_full_distillation():
    assert climbed([0.9599, 0.96], [0.0, 1.0])[1][0] == 1
    assert climbed([0.96, 0.96], [0.0, 1.0])[1][0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--budget.keep", "0.9", "--budget.encoder", "0.2"],
            "budget.keep: 0.9 asks for the smallest .* budget.encoder",
        ),
        (["--budget.keep", "0.9", "--budget.latency_ms", "2"], "give one of the two"),
        (["--budget.keep", "0"], "budget.keep: 0.0 is out of range"),
        (["--budget.keep", "1.2"], "budget.keep: 1.2 is out of range"),
        (["--budget.keep", "0.9", "--strategy", "paper"], "strategy paper has no such limit"),
        (["--budget.memory_mb", "9", "--strategy", "inherit"], "strategy inherit has no such limit"),
    ],
)
def test_wrong_budgets_end_in_one_line(given, message):
    with pytest.raises(UserError, match=message):
        parse(given)


def test_a_share_of_a_log_likelihood_is_refused():
    spec = TaskSpec("toy", "classification", ("text",), "label", ("no", "yes"), "neg_log_loss")
    ctx = SimpleNamespace(spec=spec, config=SimpleNamespace(budget=SimpleNamespace(keep=0.9)))
    with pytest.raises(UserError, match=r"budget.keep: 0.9: no share of neg_log_loss"):
        check_ladder(ctx, None)


def argv(folder: Path, name: str, keep: float) -> list[str]:
    given = small(folder, folder / "runs", name, budget__keep=keep, inherit__ratios="[1,1/2,1/4,1/8]")
    place = given.index("--budget.encoder")
    return given[:place] + given[place + 2 :]


@pytest.fixture(scope="module")
def kept_run(nursery, folder) -> dict:
    ended = nursery.run(argv(folder, "calm", 0.7), folder / "cache", plots=True)
    assert ended.code == 0, ended.err
    path = folder / "runs" / "calm"
    return {"path": path, "outcome": outcome(path), "seconds": ended.seconds, "out": ended.out}


def test_the_ladder_is_told_everywhere(kept_run):
    summary = json.loads((kept_run["path"] / "summary.json").read_text())
    told = summary["inherit"]["keep"]
    assert (told["wanted"], told["rows"]) == (0.7, summary["task"]["rows"]["score"] + summary["task"]["rows"]["select"])
    assert told["verdict"] in kept_run["out"]
    assert told["verdict"] in (kept_run["path"] / "best" / "model" / "README.md").read_text()
    sizes = [rung["encoder"] for rung in told["ladder"]]
    assert sizes == sorted(sizes)
    teacher = next(m for m in summary["evidence"]["models"] if m["name"] == "teacher")["params"]["encoder"]
    assert all(rung["encoder"] <= rung["share"] * 1.005 * teacher for rung in told["ladder"])
    finished = {rung["share"]: rung["distilled"] for rung in told["ladder"] if rung["distilled"]}
    assert told["share"] in finished
    assert told["held"] == (finished[told["share"]]["value"] >= 0.7)
    for rung in finished.values():
        assert rung["low"] <= rung["value"] + 1e-9
        assert rung["value"] <= rung["high"] + 1e-9
    others = {f"encoder-{share:g}" for share in finished if share != told["share"]}
    assert set(summary["baselines"]) == others
    assert (kept_run["path"] / "report.html").stat().st_size > 10_000


def test_every_student_of_the_round_trains_to_its_end(kept_run):
    with Ledger(kept_run["path"] / "study.db") as ledger:
        trials = ledger.trials("round")
    told = json.loads((kept_run["path"] / "summary.json").read_text())["inherit"]["keep"]
    assert [t.attrs["group"] for t in trials] == [f"encoder-{rung['share']:g}" for rung in told["ladder"]]
    assert all(t.state == "complete" and 0 <= t.attrs["metric"] <= 1 for t in trials)
    teachers = {
        t.attrs["metric"] / rung["after the last round"] for t, rung in zip(trials, told["ladder"], strict=True)
    }
    assert max(teachers) - min(teachers) < 1e-9


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_killed_run_resumes_to_the_same_end(nursery, folder, kept_run, share):
    name = f"kill{share}"
    killed = nursery.run(
        argv(folder, name, 0.7), folder / f"cache-{name}", kill_after=share * kept_run["seconds"] * 0.6
    )
    run = folder / "runs" / name
    assert killed.code in (-9, 0), killed.err
    if run.exists():
        assert unfinished_files(run) == []
    again = ["--resume", str(run)] if (run / "config.yaml").exists() else argv(folder, name, 0.7)
    resumed = nursery.run(again, folder / f"cache-{name}")
    assert resumed.code == 0, resumed.err
    assert outcome(run) == kept_run["outcome"]
    assert (
        json.loads((run / "summary.json").read_text())["inherit"]["keep"]
        == (json.loads((kept_run["path"] / "summary.json").read_text())["inherit"]["keep"])
    )


def test_a_ladder_that_no_size_holds_says_so(nursery, folder):
    ended = nursery.run([*argv(folder, "high", 1.0), "--inherit.lr", "1e-12"], folder / "cache")
    assert ended.code == 0, ended.err
    told = json.loads((folder / "runs" / "high" / "summary.json").read_text())["inherit"]["keep"]
    if not told["held"]:
        assert "no size of the ladder holds 1" in ended.out
    assert told["held"] == any(r["distilled"] and r["distilled"]["value"] >= 1 for r in told["ladder"])
