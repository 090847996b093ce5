"""Candidates shared out among workers on one ledger: any number, on any machines, joining and leaving at will.

An entry of the study is waiting when a worker proposes the candidate, running when one takes it (the storage lets
exactly one do that), then complete, failed or pruned. A running entry gives signs of life through Optuna's heartbeat;
when they stop, any worker fails it and the candidate is offered again. A trial is written with its state last.

Several entries may bear the same number: a finished one counts before a live one, an earlier before a later. A study
notes what its trials depend on (`search.config.identity`), and a worker that differs is refused (docs/decisions/0027).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from search.ledger.entries import Entry
from search.ledger.ledger import HEARTBEAT, Ledger
from search.ledger.records import RUN, Candidate, Trial, optuna_state, outcome, to_optuna

T = TypeVar("T")

POLL = (0.1, 2.0)
"""Seconds between two looks at the ledger while waiting: at first, and in the end."""

RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds to wait before an operation is tried again whose connection failed, such as while a server restarts."""


class LedgerBoard:
    """One worker on a shared ledger.

    Args:
        ledger: made with `run`.
        stage: name of the stage.
        facts: what its trials depend on, by name: JSON values; the same for all workers.
    """

    workers = 2  # at least: others may come at any time

    def __init__(self, ledger: Ledger, stage: str, facts: Mapping[str, Any]) -> None:
        self.ledger, self.stage, self.facts = ledger, stage, dict(facts)
        self.worker = f"{socket.gethostname()}:{os.getpid()}"
        self._tag = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self._candidates: dict[int, Candidate] = {}
        self._mine: dict[int, int] = {}
        self._stop = threading.Event()
        self._pause = POLL[0]
        self._swept = 0.0

    def __enter__(self) -> LedgerBoard:
        self._study, self._choices = self._retrying(lambda: self.ledger.study(self.stage))
        self._agree()
        self._thread = threading.Thread(target=self._beat, name="ffnas-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._mine:  # leaving early: others need not wait for the signs of life to go stale
            with contextlib.suppress(UserError):  # the reason for leaving is the one to report
                for entry in self._mine.values():
                    self._give_up(entry)

    def settle(self, candidates: Sequence[Candidate]) -> list[Architecture]:
        self._candidates |= {c.number: c for c in candidates}
        entries = self._offered(candidates)
        return [self._settled(c, entries[c.number]) for c in candidates]

    def finished(self) -> Mapping[int, Trial]:
        finished = {n: e.trial for n, e in self._entries().items() if e.trial is not None}
        self._candidates = {n: c for n, c in self._candidates.items() if n not in finished}
        return finished

    def claim(self, numbers: Sequence[int], limit: int, *, whole: bool) -> list[int]:
        self._sweep()
        claimed: list[int] = []
        entries = self._offered([self._candidates[n] for n in numbers])
        for number in numbers:
            if len(claimed) == limit:
                break
            if self._take(entries[number]):
                claimed.append(number)
            elif whole:
                self._release(claimed)
                return []
        self._pause = POLL[0]
        return claimed

    def finish(self, trial: Trial) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        entry = self._mine.pop(trial.number, None)
        if entry is None:
            return
        storage, values = self.ledger.storage, None if trial.score is None else [trial.score]

        def write() -> None:
            # whoever took this worker for dead has finished the trial, or will, with the same result
            with contextlib.suppress(UpdateFinishedTrialError):
                for name, value in outcome(trial).items():
                    storage.set_trial_user_attr(entry, name, value)
                storage.set_trial_state_values(entry, optuna_state(trial), values)

        self._retrying(write)

    def wait(self) -> None:
        self._sweep()
        time.sleep(self._pause * random.uniform(0.8, 1.2))
        self._pause = min(POLL[1], 1.5 * self._pause)

    def _agree(self) -> None:
        """Notes what the study's trials depend on, or compares it with what is noted."""
        noted = self._noted()
        if noted is None:
            self._retrying(lambda: self._study.set_user_attr("facts", self.facts))
        elif noted != self.facts:
            self._refuse(noted)

    def _noted(self) -> Mapping[str, Any] | None:
        return self._retrying(lambda: self._study.user_attrs).get("facts")

    def _refuse(self, noted: Mapping[str, Any]) -> None:
        different = [n for n in (*noted, *self.facts) if noted.get(n) != self.facts.get(n)]
        if not different:
            raise UserError(
                f"ledger {self.ledger.name}: study {self._study.study_name} holds candidates of a worker that began at"
                " the same moment with other options: give all workers the same options, and this run another --name"
            )
        settings = [n for n in different if not n.startswith("weights.")]
        if settings:
            name = settings[0]
            raise UserError(
                f"ledger {self.ledger.name}: study {self._study.study_name} was begun with {name}"
                f" {noted.get(name)!r}, this worker has {self.facts.get(name)!r}: give all workers the same options and"
                " data, or another --name"
            )
        raise UserError(
            f"ledger {self.ledger.name}: study {self._study.study_name} was begun from other {different[0][8:]} weights"
            " than this worker's, which another machine or number of threads may have trained: let workers help with"
            " ffnas join and the first one's run directory"
        )

    def _entries(self) -> dict[int, Entry]:
        """The entry that counts of every number that has one."""
        chosen: dict[int, Entry] = {}
        for entry in self._retrying(lambda: self.ledger.entries(self.stage)):
            if entry.run != self._tag:
                self._refuse(self._noted() or {})
            assert entry.number is not None  # ours, as its tag says
            if entry.number not in chosen or (entry.trial is not None and chosen[entry.number].trial is None):
                chosen[entry.number] = entry
        return chosen

    def _offered(self, candidates: Sequence[Candidate]) -> dict[int, Entry]:
        """The entries that count, with one of every candidate; any may be abandoned while others are added."""
        entries = self._entries()
        while missing := [c for c in candidates if c.number not in entries]:
            entries = self._offer(missing)
        return entries

    def _offer(self, candidates: Sequence[Candidate]) -> dict[int, Entry]:
        """Adds waiting entries, and takes back those that somebody else was faster with."""
        storage, study = self.ledger.storage, self._study
        added = [
            self._retrying(
                partial(storage.create_new_trial, study._study_id, to_optuna(c, self._choices, **{RUN: self._tag}))
            )
            for c in candidates
        ]
        entries = self._entries()
        counting = {e.id for e in entries.values()}
        for entry in added:
            if entry not in counting:
                self._give_up(entry)
        return entries

    def _settled(self, candidate: Candidate, entry: Entry) -> Architecture:
        known = entry.trial or entry.candidate()
        if known.key == candidate.key:
            return candidate.architecture
        self._candidates[candidate.number] = Candidate(candidate.number, known.architecture, known.key, known.params)
        return known.architecture

    def _take(self, entry: Entry) -> bool:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        if not entry.waiting:
            return False
        storage, number = self.ledger.storage, entry.id

        def take() -> bool:
            # a sign of life first: an entry without any never counts as abandoned
            storage.record_heartbeat(number)
            try:
                return storage.set_trial_state_values(number, TrialState.RUNNING)
            except UpdateFinishedTrialError:
                return False

        if not self._retrying(take):
            return False
        assert entry.number is not None  # of `_entries`
        self._mine[entry.number] = number
        self._retrying(lambda: storage.set_trial_user_attr(number, "worker", self.worker))
        return True

    def _release(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._give_up(self._mine.pop(number))

    def _give_up(self, entry: int) -> None:
        """Marks an entry as abandoned."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        def fail() -> None:
            with contextlib.suppress(UpdateFinishedTrialError):
                self.ledger.storage.set_trial_state_values(entry, TrialState.FAIL)

        self._retrying(fail)

    def _sweep(self) -> None:
        """Fails entries whose workers gave no sign of life, now and then."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import fail_stale_trials

        if time.monotonic() - self._swept > (self.ledger.storage.heartbeat_interval or HEARTBEAT):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)  # tested here against a server
                self._retrying(lambda: fail_stale_trials(self._study))
            self._swept = time.monotonic()

    def _beat(self) -> None:
        interval = self.ledger.storage.heartbeat_interval or HEARTBEAT
        while not self._stop.wait(interval):
            for entry in list(self._mine.values()):
                # a database that is away for long is reported where the trial is written
                with contextlib.suppress(UserError), self.ledger.errors():
                    self.ledger.storage.record_heartbeat(entry)
        self.ledger.storage.remove_session()

    def _retrying(self, work: Callable[[], T]) -> T:
        """What `work` gives, tried again when the connection fails. Each use of it may be repeated without harm."""
        for pause in (*RETRIES, None):
            try:
                with self.ledger.errors():
                    return work()
            except UserError as error:
                if pause is None or not _connection_failed(error):
                    raise
            time.sleep(pause)
        raise AssertionError("unreachable")


def _connection_failed(error: BaseException) -> bool:
    import sqlalchemy.exc

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, sqlalchemy.exc.OperationalError):
            return True
        cause = cause.__cause__
    return False
