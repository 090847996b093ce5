"""Where a run's numbers go beside the run directory: TensorBoard, Weights & Biases, MLflow, by their own clients.

Each takes the configuration once, scalars over the steps of their own phase, and the final scores. A resumed run goes
on in the same run of the tracker: its name there is kept in `trackers.json`.

Rejected: transformers' callbacks of the same names. They belong to its `Trainer`, which trains nothing here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from engine.errors import UserError
from engine.files import write_json_atomic

KNOWN = ("tensorboard", "wandb", "mlflow")
NONE = "none"
PROJECT = "ffnas"
"""Project of wandb and experiment of mlflow where WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME say nothing."""
KEPT = "trackers.json"
_BATCH = 100
"""Most parameters that MLflow takes at a time."""


class Tracker(Protocol):
    """One place numbers go to."""

    def params(self, values: Mapping[str, Any]) -> None:
        """The configuration, by dotted name."""
        ...

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Scalars named GROUP/NAME at a step of the group's own count."""
        ...

    def final(self, values: Mapping[str, float]) -> None:
        """Final scores, by name."""
        ...

    def close(self) -> None:
        """Everything is written."""
        ...


def names_of(given: str) -> list[str]:
    """The trackers a configuration names: `tensorboard`, `wandb,mlflow`, or none.

    Raises:
        UserError: an unknown one, or one whose library is not installed.
    """
    names = [name for name in (part.strip() for part in given.split(",")) if name and name != NONE]
    for name in names:
        if name not in KNOWN:
            raise UserError(f"tracker: {name!r} is not known: choose one or several of {', '.join(KNOWN)}, or {NONE}")
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"tracker: {name} is not installed: run `pip install 'ffnas[{name}]'`, or leave it out of --tracker"
            )
    return list(dict.fromkeys(names))


def open_trackers(names: Sequence[str], folder: Path) -> dict[str, Tracker]:
    """Starts trackers for the run in `folder`, or goes on with those it had.

    Raises:
        UserError: one refuses, such as for want of an account, with its own words.
    """
    kept = _kept(folder)
    made: dict[str, Tracker] = {}
    for name in names:
        try:
            if name == "tensorboard":
                made[name] = TensorBoard(folder / name)
            elif name == "wandb":
                made[name] = Wandb(folder, kept.setdefault(name, uuid.uuid4().hex))
            else:
                mlflow = made[name] = Mlflow(folder, kept.get(name))
                kept[name] = mlflow.run_id
        except Exception as error:
            for tracker in made.values():
                tracker.close()
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"tracker: {name} cannot be used: {reason:.300}: leave it out of --tracker, or mend that"
            ) from error
    if kept:
        write_json_atomic(folder / KEPT, kept)
    return made


def _kept(folder: Path) -> dict[str, str]:
    try:
        values = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a run that had none; a damaged file begins a new run of the tracker
        return {}
    return {str(k): str(v) for k, v in values.items()} if isinstance(values, dict) else {}


class TensorBoard:
    """Event files under `folder`; view them with `tensorboard --logdir folder`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def params(self, values: Mapping[str, Any]) -> None:
        rows = "\n".join(f"| {name} | {value} |" for name, value in values.items())
        self.writer.add_text("config", f"| option | value |\n|---|---|\n{rows}")

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def final(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, 0)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and the like count.

    Its own step only grows, so every group has its steps as a metric of its own.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._groups: set[str] = set()

    def params(self, values: Mapping[str, Any]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        if group not in self._groups:
            self._groups.add(group)
            self.run.define_metric(f"{group}/step")
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self.run.log({f"{group}/step": step, **{f"{group}/{name}": value for name, value in values.items()}})

    def final(self, values: Mapping[str, float]) -> None:
        self.run.summary.update(dict(values))

    def close(self) -> None:
        self.run.finish()


class Mlflow:
    """A run of MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME count."""

    def __init__(self, folder: Path, identity: str | None) -> None:
        import mlflow

        self.mlflow = mlflow
        if identity is None:
            if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
                mlflow.set_experiment(PROJECT)
            self.run_id = str(mlflow.start_run(run_name=folder.name).info.run_id)
        else:
            self.run_id = str(mlflow.start_run(run_id=identity).info.run_id)
        self._goes_on = identity is not None

    def params(self, values: Mapping[str, Any]) -> None:
        if self._goes_on:  # they are there, and MLflow refuses to write a parameter a second time
            return
        rest = iter({name: str(value)[:500] for name, value in values.items()}.items())
        while batch := dict(islice(rest, _BATCH)):
            self.mlflow.log_params(batch)

    def log(self, group: str, values: Mapping[str, float], step: int) -> None:
        self.mlflow.log_metrics({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def final(self, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values))

    def close(self) -> None:
        self.mlflow.end_run()
