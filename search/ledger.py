"""The ledger: every trial that ended, kept in an Optuna study so that optuna-dashboard opens it.

One study per stage, in a SQLite file of the run directory or in any database Optuna's storage knows. A trial is
written once, in one transaction, when it ends; a kill at any instant leaves either the whole trial or none of it. Each
carries a checksum of its values: SQLite notices a torn page, not a changed digit.

Parameters of a trial are the stack and the ratio of every layer, as categories, for the dashboard's importances.
Optuna holds a parameter's categories fixed within a study, so each study notes them when it is made and a value from
outside them (a space that was widened) stays out of the parameters; the architecture text holds it in any case.

Chosen: SQLite's rollback journal and a long timeout. Rejected: write-ahead logging; it needs shared memory, which
network file systems of clusters lack, and it splits the ledger over three files, for writes that come seconds apart.
Rejected: asking Optuna for the next trial (`ask`/`tell`); a trial begun and killed would stay in the study as running.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.architecture import Architecture
from engine.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STATES = ("complete", "failed", "pruned")
STACKS = (1, 2, 3, 4)
RATIOS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))
TIMEOUT = 30.0
"""Seconds to wait for another process that is writing to the same SQLite file."""


@dataclass(frozen=True)
class Trial:
    """The record of one evaluated candidate.

    A complete trial has a finite score; one whose score is NaN or infinite becomes a failed one with that reason.

    Attributes:
        stage: name of the stage, such as "stage1".
        number: position in the stage, from 0; unique in it.
        architecture: the candidate.
        key: its canonical key.
        score: higher is better; None unless complete (a pruned trial may have one).
        params: parameter count.
        seconds: wall time of training and scoring.
        state: "complete", "failed" or "pruned".
        reason: why it failed or was pruned, one line.
        attrs: further JSON values.
    """

    stage: str
    number: int
    architecture: Architecture
    key: str
    score: float | None
    params: int
    seconds: float
    state: str = "complete"
    reason: str | None = None
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"state {self.state!r}: a trial is one of {', '.join(STATES)}")
        if self.number < 0:
            raise ValueError(f"number {self.number}: trials are numbered from 0")
        if self.score is not None:
            object.__setattr__(self, "score", float(self.score))
            if not math.isfinite(self.score):
                object.__setattr__(self, "reason", self.reason or f"the score is {self.score}")
                object.__setattr__(self, "score", None)
                object.__setattr__(self, "state", "failed" if self.state == "complete" else self.state)
        if self.state == "complete" and self.score is None:
            raise ValueError("a complete trial has a score")
        if self.state == "failed" and self.score is not None:
            raise ValueError("a failed trial has no score")


class Ledger:
    """Finished trials, by stage.

    Args:
        target: path of a SQLite file (made if missing) or a database URL (`postgresql://...`).
        stacks, ratios: categories of the parameters of new studies.
        timeout: seconds to wait for a locked SQLite file.
        recorded: called after every trial that was written.

    Raises:
        UserError: the database cannot be opened, is locked or is damaged.
    """

    def __init__(
        self,
        target: str | os.PathLike[str],
        *,
        stacks: Sequence[int] = STACKS,
        ratios: Sequence[Fraction] = RATIOS,
        timeout: float = TIMEOUT,
        recorded: Callable[[], None] = lambda: None,
    ) -> None:
        self._recorded = recorded
        text = os.fspath(target)
        if not text.isprintable() or "%00" in text:
            raise UserError(f"ledger {text!r:.80}: holds characters no path or URL has: give another one")
        path = Path(text) if "://" not in text else None
        self._shared = path is None and not text.startswith("sqlite:")
        self._name = str(path) if path is not None else _without_password(text)
        self._choices = {"stacks": [int(s) for s in stacks], "ratios": [str(Fraction(r)) for r in ratios]}
        self._studies: dict[str, Study] = {}
        self._categories: dict[str, dict[str, list[Any]]] = {}
        self._keys: dict[str, dict[int, str]] = {}
        if path is not None:
            _check_file(path, timeout)
            text = "sqlite:///study.db"  # a name only: the connection is made from the path, no character is special
        import optuna  # deferred: a second of imports that `--help` and input checks do without

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options: dict[str, Any]
        if path is not None:
            place = str(path.resolve())
            options = {"creator": lambda: sqlite3.connect(place, timeout=timeout, check_same_thread=False)}
        else:
            options = {"pool_pre_ping": True} if self._shared else {"connect_args": {"timeout": timeout}}
        with self._errors():
            try:
                self._storage = optuna.storages.RDBStorage(text, engine_kwargs=options)
            except ImportError as error:
                raise UserError(
                    f"ledger {self._name}: its database driver is not installed: {error.__cause__}"
                ) from error
            except (RuntimeError, ValueError) as error:  # tables of another version of Optuna; a URL like sqlite://:
                raise UserError(f"ledger {self._name}: {error}") from error
        # Optuna looks the trial up before each of its parameters; without a flush each time, recording takes half
        # as long (25 instead of 50 ms at 12 layers), and all still goes into one transaction.
        self._storage.remove_session()
        self._storage.scoped_session.configure(autoflush=False)

    def record(self, trial: Trial) -> None:
        """Writes a finished trial; writing one again that is already there (same stage, number, key) does nothing.

        Raises:
            UserError: the number is taken by another candidate, or the database cannot be written.
        """
        keys = self._known(trial.stage)
        if trial.number in keys:
            if keys[trial.number] != trial.key:
                raise UserError(
                    f"ledger {self._name}: trial {trial.number} of {trial.stage} is there with another"
                    " candidate: resume with the run's own configuration and seed, or start a new run"
                )
            return
        study, choices = self._make(trial.stage)
        frozen = _to_optuna(trial, choices)
        with self._errors():
            study.add_trial(frozen)
        keys[trial.number] = trial.key
        self._recorded()

    def trials(self, stage: str) -> list[Trial]:
        """The finished trials of a stage, by number.

        Raises:
            UserError: the database cannot be read, or holds what ffnas did not write.
        """
        trials = [self._from_optuna(stage, frozen) for frozen in self._frozen(stage)]
        return sorted(trials, key=lambda t: t.number)

    def stages(self) -> list[str]:
        """Names of the stages that have begun, in alphabetical order."""
        with self._errors():
            return sorted(study.study_name for study in self._storage.get_all_studies())

    def close(self) -> None:
        """Closes the connections to the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, stage: str) -> Study | None:
        """The stage's study, None if nothing was recorded in it yet."""
        if stage not in self._studies:
            import optuna

            with self._errors():
                if stage not in self.stages():
                    return None
                self._studies[stage] = optuna.load_study(storage=self._storage, study_name=stage)
        return self._studies[stage]

    def _make(self, stage: str) -> tuple[Study, dict[str, list[Any]]]:
        """The stage's study, made if missing, and the categories of its parameters."""
        study = self._load(stage)
        if stage not in self._categories:
            import optuna

            with self._errors():
                if study is None:
                    study = optuna.create_study(
                        storage=self._storage, study_name=stage, direction="maximize", load_if_exists=True
                    )
                if "choices" not in study.user_attrs:
                    study.set_user_attr("choices", self._choices)
                self._studies[stage], self._categories[stage] = study, study.user_attrs["choices"]
        return self._studies[stage], self._categories[stage]

    def _frozen(self, stage: str) -> list[FrozenTrial]:
        study = self._load(stage)
        if study is None:
            return []
        with self._errors():
            return [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]

    def _known(self, stage: str) -> dict[int, str]:
        """Keys by number. A SQLite ledger belongs to one process, so it is read once; others are read every time."""
        if stage not in self._keys or self._shared:
            self._keys[stage] = {t.number: t.key for t in self.trials(stage)}
        return self._keys[stage]

    def _from_optuna(self, stage: str, frozen: FrozenTrial) -> Trial:
        try:
            attrs = frozen.user_attrs
            trial = Trial(
                stage=stage,
                number=int(attrs["number"]),
                architecture=Architecture.parse(attrs["architecture"]),
                key=attrs["key"],
                score=frozen.value,
                params=int(attrs["params"]),
                seconds=float(attrs["seconds"]),
                state={"COMPLETE": "complete", "FAIL": "failed", "PRUNED": "pruned"}[frozen.state.name],
                reason=attrs.get("reason"),
                attrs=attrs.get("attrs", {}),
            )
            if attrs.get("check", _check_sum(trial)) != _check_sum(trial):
                raise ValueError("its checksum is wrong")
            return trial
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"ledger {self._name}: entry {frozen.number} of {stage} was not written by ffnas or is damaged"
                f" ({type(error).__name__}: {error}): restore a copy or start a new run"
            ) from error

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        import sqlalchemy.exc
        from optuna.exceptions import StorageInternalError

        try:
            yield
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
            raise UserError(_explain(self._name, error)) from error


def _to_optuna(trial: Trial, choices: dict[str, list[Any]]) -> FrozenTrial:
    from optuna.distributions import BaseDistribution, CategoricalDistribution
    from optuna.trial import FrozenTrial, TrialState

    values: dict[str, Any] = {}
    distributions: dict[str, BaseDistribution] = {}
    for index, layer in enumerate(trial.architecture.layers):
        for name, value, allowed in (
            (f"layer{index}.stack", layer.stack, choices["stacks"]),
            (f"layer{index}.ratio", str(layer.ratio), choices["ratios"]),
        ):
            if value in allowed:
                values[name] = value
                distributions[name] = CategoricalDistribution(allowed)
    attrs = {
        "number": trial.number,
        "architecture": str(trial.architecture),
        "key": trial.key,
        "params": trial.params,
        "seconds": trial.seconds,
        "check": _check_sum(trial),
    }
    # each attribute costs a millisecond: empty ones are left out
    if trial.reason is not None:
        attrs["reason"] = trial.reason
    if trial.attrs:
        attrs["attrs"] = json.loads(json.dumps(trial.attrs, allow_nan=False))
    now = datetime.now()
    state = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "pruned": TrialState.PRUNED}[trial.state]
    return FrozenTrial(
        number=-1,  # the storage numbers entries by itself; ours is an attribute
        trial_id=-1,
        state=state,
        value=trial.score,
        datetime_start=now - timedelta(seconds=trial.seconds),
        datetime_complete=now,
        params=values,
        distributions=distributions,
        user_attrs=attrs,
        system_attrs={},
        intermediate_values={},
    )


def _check_sum(trial: Trial) -> str:
    """16 hexadecimal digits over the values of a trial."""
    score = None if trial.score is None else trial.score.hex()
    values = [trial.number, str(trial.architecture), trial.key, score, trial.params, float(trial.seconds)]
    text = json.dumps([*values, trial.state, trial.reason, trial.attrs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_file(path: Path, timeout: float) -> None:
    """Raises `UserError` unless `path` is a sound SQLite file or can become one."""
    name = str(path)
    try:
        path.exists()
    except OSError as error:
        raise UserError(f"ledger {name:.80}: {error.strerror}: give another path") from error
    if not path.parent.is_dir():
        raise UserError(f"ledger {name}: the folder {path.parent} does not exist: create it or give another path")
    if path.is_dir():
        raise UserError(f"ledger {name}: is a folder: give the path of a file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"ledger {name}: is not writable: fix its rights or choose another place")
    if not path.exists():
        return
    try:
        connection = sqlite3.connect(path, timeout=timeout)
        try:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise UserError(_explain(name, error)) from error
    if verdict != "ok":
        raise UserError(f"ledger {name}: is damaged ({verdict}): restore a copy or start a new run")


def _explain(name: str, error: BaseException) -> str:
    """One line for a database error: what is wrong with the ledger and what to do."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    reason = str(getattr(root, "orig", None) or root).splitlines()[0]
    low = reason.lower()
    for sign, text in (
        ("locked", "is locked by another process: end that process or wait, then resume"),
        ("readonly", "is not writable: fix its rights or choose another place"),
        ("unable to open", "cannot be opened: check the path and its rights"),
        ("disk is full", "cannot be written, the disk is full: free space, then resume"),
        ("not a database", "is damaged or not a SQLite file: restore a copy or start a new run"),
        ("malformed", "is damaged: restore a copy or start a new run"),
    ):
        if sign in low:
            return f"ledger {name}: {text}"
    return f"ledger {name}: {reason}"


def _without_password(url: str) -> str:
    """The URL as error messages may show it."""
    scheme, _, rest = url.partition("://")
    account, at, host = rest.rpartition("@")
    return f"{scheme}://{account.partition(':')[0]}{at}{host}" if at else url
