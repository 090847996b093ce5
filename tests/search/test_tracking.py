"""Numbers of a run at TensorBoard (its real event files), wandb and mlflow (stand-ins that write down every call)."""

import importlib.machinery
import json
import math
import sys
import types

import numpy as np
import pytest

from engine.architecture.shape import ModelShape
from engine.errors import UserError
from engine.training.loop import PhaseLog
from search.config.options import parse
from search.config.schema import SearchConfig
from search.console.trackers import names_of
from search.ledger.ledger import Trial
from search.space import SearchSpace
from search.tracking import open_scalars


def module(name, **members):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(members)
    return made


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb: `calls` in order."""
    calls = []

    class Run:
        def __init__(self):
            self.config = types.SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))
            self.summary = types.SimpleNamespace(update=lambda values: calls.append(("summary", values)))

        def define_metric(self, name, step_metric=None):
            calls.append(("metric", name, step_metric))

        def log(self, values):
            calls.append(("log", values))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    made = module("wandb", init=init, Settings=dict, calls=calls)
    monkeypatch.setitem(sys.modules, "wandb", made)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return made


@pytest.fixture
def mlflow(monkeypatch):
    """A stand-in for mlflow, as strict about parameters as the real one."""
    calls = []

    def start_run(run_id=None, run_name=None):
        calls.append(("start", run_id, run_name))
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id or "r7"))

    def log_params(values):
        assert len(values) <= 100
        assert all(len(value) <= 500 for value in values.values())
        calls.append(("params", values))

    made = module(
        "mlflow",
        calls=calls,
        set_experiment=lambda name: calls.append(("experiment", name)),
        start_run=start_run,
        log_params=log_params,
        log_metrics=lambda values, step=None: calls.append(("metrics", values, step)),
        end_run=lambda: calls.append(("end",)),
    )
    monkeypatch.setitem(sys.modules, "mlflow", made)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return made


def fed(config, folder, notes=None):
    """Scalars of a run in which everything happens once."""
    arch = SearchSpace(ModelShape(24, 2, 24)).sample(np.random.default_rng(0))
    scalars = open_scalars(config, folder, (notes if notes is not None else []).append)
    scalars.values("teacher", {"loss": 0.75}, 5)
    scalars.phase(PhaseLog("search task", 10, 20, {"total": 1.5, "hidden": math.nan}, 1.0))
    for number, (score, state) in enumerate([(0.5, "complete"), (None, "failed"), (0.4, "complete"), (0.9, "pruned")]):
        attrs = {"latency_ms": 3.0 + number, "rungs": {"4": 0.1}}
        scalars.trial(Trial("round", number, arch, str(number), score, 1000, 0.25, state, None, attrs))
    scalars.model("found", {"accuracy": 0.75})
    scalars.close()


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fed(SearchConfig(seed=41), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert values["teacher/loss"] == [(5, 0.75)]
    assert values["search task/total"] == [(10, 1.5)]
    assert "search task/hidden" not in values  # was not finite
    assert values["round/score"] == [(0, 0.5), (2, 0.4), (3, 0.9)]
    assert values["round/best"] == [(0, 0.5), (2, 0.5)]
    assert [v for _, v in values["round/failed"]] == [0, 1, 1, 1]
    assert [v for _, v in values["round/latency_ms"]] == [3, 4, 5, 6]
    assert values["models/found/accuracy"] == [(0, 0.75)]
    assert not any("rungs" in tag for tag in values)
    text = events.Tensors(events.Tags()["tensors"][0])[0].tensor_proto.string_val[0].decode()
    assert "| seed | 41 |" in text
    assert "| inherit.lr | 0.0003 |" in text


def test_wandb(tmp_path, wandb):
    config = SearchConfig(tracker="wandb", ledger="postgresql://ann:secret@host/base", name="a")
    fed(config, tmp_path / "run7")
    kinds = [call[0] for call in wandb.calls]
    assert kinds[:2] == ["init", "config"]
    assert kinds[-2:] == ["summary", "finish"]
    options = wandb.calls[0][1]
    assert (options["project"], options["name"], options["resume"]) == ("ffnas", "run7", "allow")
    params = wandb.calls[1][1]
    assert (params["inherit.batch_size"], params["seed"]) == (32, 0)
    assert "secret" not in json.dumps(params)
    assert ("metric", "teacher/*", "teacher/step") in wandb.calls
    logged = [call[1] for call in wandb.calls if call[0] == "log"]
    assert {"teacher/step": 5, "teacher/loss": 0.75} in logged
    assert {"search task/step": 10, "search task/total": 1.5} in logged
    assert [values["round/best"] for values in logged if "round/best" in values] == [0.5, 0.5]
    assert ("summary", {"models/found/accuracy": 0.75}) in wandb.calls
    fed(config, tmp_path / "run7")
    again = [call[1]["id"] for call in wandb.calls if call[0] == "init"]
    assert again[0] == again[1]  # a resumed run goes on in its own run there
    fed(config, tmp_path / "run8")
    assert wandb.calls[-1] == ("finish",)
    assert [call[1]["id"] for call in wandb.calls if call[0] == "init"][2] != again[0]


def test_mlflow(tmp_path, mlflow):
    fed(SearchConfig(tracker="mlflow"), tmp_path / "run7")
    assert mlflow.calls[:2] == [("experiment", "ffnas"), ("start", None, "run7")]
    params = {k: v for call in mlflow.calls if call[0] == "params" for k, v in call[1].items()}
    assert params["inherit.lr"] == "0.0003"
    assert len(params) > 100  # in several calls
    assert ("metrics", {"teacher/loss": 0.75}, 5) in mlflow.calls
    assert ("metrics", {"models/found/accuracy": 0.75}, None) in mlflow.calls
    assert mlflow.calls[-1] == ("end",)
    mlflow.calls.clear()
    fed(SearchConfig(tracker="mlflow"), tmp_path / "run7")
    assert mlflow.calls[0] == ("start", "r7", None)
    assert not [call for call in mlflow.calls if call[0] == "params"]  # they are there already


def test_several_and_none(tmp_path, wandb, mlflow):
    fed(SearchConfig(tracker="wandb, mlflow"), tmp_path)
    assert wandb.calls[-1] == ("finish",)
    assert mlflow.calls[-1] == ("end",)
    assert set(json.loads((tmp_path / "trackers.json").read_text())) == {"wandb", "mlflow"}
    assert open_scalars(SearchConfig(tracker="none"), tmp_path, print) is None


def test_one_that_fails_on_the_way_is_left_out(tmp_path, wandb, mlflow, monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(mlflow, "log_metrics", broken)
    notes = []
    fed(SearchConfig(tracker="mlflow,wandb"), tmp_path, notes)
    assert notes == ["tracker mlflow is left out from here on: no route to host"]
    assert wandb.calls[-1] == ("finish",)


def test_one_that_refuses_ends_in_one_line(tmp_path, wandb, monkeypatch):
    def refused(**_):
        raise RuntimeError("api key not configured")

    monkeypatch.setattr(wandb, "init", refused)
    with pytest.raises(UserError, match="tracker: wandb cannot be used: api key not configured: leave it out"):
        open_scalars(SearchConfig(tracker="wandb"), tmp_path, print)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_names_its_extra(name, monkeypatch):
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=rf"tracker: {name} is not installed: run `pip install 'ffnas\[{name}\]'`"):
        parse(["--tracker", name])


def test_names():
    assert names_of("tensorboard") == ["tensorboard"]
    assert names_of("none") == names_of("") == []
    with pytest.raises(UserError, match="'comet' is not known"):
        names_of("comet")


@pytest.mark.parametrize(
    ("given", "tracker"),
    [(["--tensorboard", "false"], "none"), (["--tensorboard=true"], "tensorboard"), ([], "tensorboard")],
)
def test_the_former_option_still_counts(given, tracker, tmp_path):
    assert parse(given)[0].tracker == tracker
    if given:
        value = given[-1].rpartition("=")[2]
        (tmp_path / "old.yaml").write_text(f"tensorboard: {value}\nseed: 3\n")
        config, _ = parse(["--config", str(tmp_path / "old.yaml")])
        assert (config.tracker, config.seed) == (tracker, 3)
