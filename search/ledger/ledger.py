"""The ledger: every trial that ended, kept in an Optuna study so that optuna-dashboard opens it.

One study per stage, in a SQLite file of the run directory or in any database Optuna's storage knows. A trial is
written once, in one transaction, when it ends, with a checksum of its values: a kill leaves all of it or nothing.
A ledger that several workers share also holds candidates that wait or run (`search.ledger.shared_board`).

Parameters of a trial are the stack and the ratio of every layer, as categories, for the dashboard's importances; a
value from outside a study's categories stays out of them, the architecture text holds it in any case
(docs/decisions/0027).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import UserError
from search.ledger import url as ledger_url
from search.ledger.entries import Entries, Entry
from search.ledger.records import STATES, Candidate, Trial, from_optuna, to_optuna

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["GRACE", "HEARTBEAT", "STATES", "Candidate", "Ledger", "Trial"]

STACKS = (1, 2, 3, 4)
RATIOS = (Fraction(1), Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))
TIMEOUT = 30.0
"""Seconds to wait for another process that is writing to the same SQLite file."""

HEARTBEAT, GRACE = 15, 90
"""Seconds between signs of life of a running trial, and without one after which its worker counts as dead."""


class Ledger:
    """Finished trials, by stage.

    Args:
        target: path of a SQLite file (made if missing) or a database URL (`postgresql://...`).
        run: name of the run among those in a shared database; its studies are called `RUN/STAGE`.
        heartbeat: seconds between signs of life of running trials, and `grace` without one after which a trial's
            worker counts as dead; for ledgers that several workers share.
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
        run: str | None = None,
        heartbeat: int = HEARTBEAT,
        grace: int = GRACE,
    ) -> None:
        self._recorded = recorded
        text = os.fspath(target)
        if not text.isprintable() or "%00" in text:
            shown = ledger_url.without_password(text)
            raise UserError(f"ledger {shown!r:.80}: holds characters no path or URL has: give another one")
        path = Path(text) if "://" not in text else None
        self.shared = run is not None
        self._run = f"{run}/" if run is not None else ""
        self._one_process = not self.shared and (path is not None or text.startswith("sqlite:"))
        self.name = str(path) if path is not None else ledger_url.without_password(text)
        self._choices = {"stacks": [int(s) for s in stacks], "ratios": [str(Fraction(r)) for r in ratios]}
        self._studies: dict[str, Study] = {}
        self._categories: dict[str, dict[str, list[Any]]] = {}
        self._keys: dict[str, dict[int, str]] = {}
        self._entries: dict[str, Entries] = {}
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
            text = ledger_url.with_driver(text)
            options = ledger_url.connection_options(text, timeout)
        beats = {"heartbeat_interval": heartbeat, "grace_period": grace} if self.shared else {}
        with self.errors():
            try:
                self.storage = self._open(text, options, beats)
            except ImportError as error:
                raise UserError(f"ledger {self.name}: {ledger_url.missing_driver(text, error)}") from error
            except (RuntimeError, ValueError) as error:  # tables of another version of Optuna; a URL like sqlite://:
                raise UserError(f"ledger {self.name}: {error}") from error
        # Optuna looks the trial up before each of its parameters; without a flush each time, recording takes half
        # as long (25 instead of 50 ms at 12 layers), and all still goes into one transaction.
        self.storage.remove_session()
        self.storage.scoped_session.configure(autoflush=False)

    def _open(self, url: str, options: dict[str, Any], beats: dict[str, Any]) -> RDBStorage:
        """The storage, its tables made if missing; made again where another process is making them just now."""
        import sqlalchemy.exc
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import RDBStorage

        for pause in (0.2, 0.5, 1.0, 2.0, None):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats; tested here against a server
                    return RDBStorage(url, engine_kwargs=options, **beats)
            except sqlalchemy.exc.DBAPIError as error:
                racing = any(sign in str(error.orig).lower() for sign in ("already exists", "duplicate", "unique"))
                if pause is None or not (self.shared and racing):
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")

    def record(self, trial: Trial) -> None:
        """Writes a finished trial; writing one again that is already there (same stage, number, key) does nothing.

        Raises:
            UserError: the number is taken by another candidate, or the database cannot be written.
        """
        keys = self._known(trial.stage)
        if trial.number in keys:
            if keys[trial.number] != trial.key:
                raise UserError(
                    f"ledger {self.name}: trial {trial.number} of {trial.stage} is there with another"
                    " candidate: resume with the run's own configuration and seed, or start a new run"
                )
            return
        study, choices = self.study(trial.stage)
        frozen = to_optuna(trial, choices)
        with self.errors():
            entry = self.storage.create_new_trial(study._study_id, frozen)  # not through a study, which keeps it all
        keys[trial.number] = trial.key
        self._reader(trial.stage, study).add(entry, trial, alone=self._one_process)
        self._recorded()

    def trials(self, stage: str) -> list[Trial]:
        """The finished trials of a stage, by number.

        Raises:
            UserError: the database cannot be read, or holds what ffnas did not write.
        """
        return sorted((e.trial for e in self.entries(stage) if e.trial is not None), key=lambda t: t.number)

    def stages(self) -> list[str]:
        """Names of the stages that have begun, in alphabetical order."""
        with self.errors():
            names = [study.study_name for study in self.storage.get_all_studies()]
        return sorted(name[len(self._run) :] for name in names if name.startswith(self._run))

    def close(self) -> None:
        """Closes the connections to the database."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, stage: str) -> Study | None:
        """The stage's study, None if nothing was recorded in it yet."""
        if stage not in self._studies:
            import optuna

            with self.errors():
                if stage not in self.stages():
                    return None
                self._studies[stage] = optuna.load_study(storage=self.storage, study_name=self._run + stage)
        return self._studies[stage]

    def study(self, stage: str) -> tuple[Study, dict[str, list[Any]]]:
        """The stage's study, made if missing, and the categories of its parameters."""
        study = self._load(stage)
        if stage not in self._categories:
            import optuna

            with self.errors():
                if study is None:
                    study = optuna.create_study(
                        storage=self.storage,
                        study_name=self._run + stage,
                        direction="maximize",
                        load_if_exists=True,
                    )
                if "choices" not in study.user_attrs:
                    study.set_user_attr("choices", self._choices)
                self._studies[stage], self._categories[stage] = study, study.user_attrs["choices"]
        return self._studies[stage], self._categories[stage]

    def entries(self, stage: str) -> Iterable[Entry]:
        """Entries of a stage that are not abandoned, in the order of their creation.

        Raises:
            UserError: the database cannot be read, or holds what ffnas did not write.
        """
        study = self._load(stage)
        if study is None:
            return ()
        reader = self._reader(stage, study)
        with self.errors():
            reader.refresh()
        return reader

    def _reader(self, stage: str, study: Study) -> Entries:
        if stage not in self._entries:
            trial_of = functools.partial(self.from_optuna, stage)
            self._entries[stage] = Entries(self.storage, study._study_id, trial_of)
        return self._entries[stage]

    def _known(self, stage: str) -> dict[int, str]:
        """Keys by number. The ledger of one process is read once, others every time."""
        if stage not in self._keys or not self._one_process:
            self._keys[stage] = {t.number: t.key for t in self.trials(stage)}
        return self._keys[stage]

    def from_optuna(self, stage: str, frozen: FrozenTrial) -> Trial:
        """The trial a finished entry holds.

        Raises:
            UserError: ffnas did not write the entry.
        """
        try:
            return from_optuna(stage, frozen)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"ledger {self.name}: entry {frozen.number} of {stage} was not written by ffnas or is damaged"
                f" ({type(error).__name__}: {error}): restore a copy or start a new run"
            ) from error

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        import sqlalchemy.exc
        from optuna.exceptions import StorageInternalError

        try:
            yield
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, sqlite3.Error) as error:
            raise UserError(_explain(self.name, error)) from error


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
