"""The entries of one study, read from the database as far as they are new and kept in little memory.

Optuna's own entry takes some ten kilobytes and names the categories of every parameter anew; of a finished one a
`Trial` is kept, under a kilobyte, and of one that is still open what a worker has to know of it. A finished entry never
changes, so a look reads what was added since the last one and what was open then.

Rejected: Optuna's `Study.get_trials`, which keeps all entries in full; and reading all of them at every look, which
takes a second at a thousand trials, with the parsing of their architectures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.architecture.architecture import Architecture
from search.ledger.records import RUN, Candidate, Trial, is_finished

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial


@dataclass(slots=True)
class Entry:
    """What is kept of an entry.

    Attributes:
        id: the storage's; ascending in the order of creation.
        number: the trial's, None where ffnas did not write the entry.
        run: what the entry's run depends on; None in a ledger that is not shared.
        waiting: whether it is free to be taken.
        about: user attributes of an open entry.
        trial: of a finished one.
    """

    id: int
    number: int | None
    run: str | None
    waiting: bool = False
    about: dict[str, Any] | None = None
    trial: Trial | None = None

    def candidate(self) -> Candidate:
        """What an open entry offers."""
        assert self.about is not None
        architecture = Architecture.parse(self.about["architecture"])
        return Candidate(int(self.about["number"]), architecture, self.about["key"], int(self.about["params"]))


class Entries:
    """Entries of a study, in the order of their creation; abandoned ones are left out.

    Args:
        storage, study: where they are.
        trial_of: makes a trial of a finished entry, or raises.
    """

    def __init__(self, storage: RDBStorage, study: int, trial_of: Callable[[FrozenTrial], Trial]) -> None:
        self._storage, self._study, self._trial_of = storage, study, trial_of
        self._kept: dict[int, Entry] = {}
        self._open: set[int] = set()
        self._last = -1

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._kept[id] for id in sorted(self._kept)])

    def add(self, id: int, trial: Trial, *, alone: bool) -> None:
        """Takes in a finished entry that this process has just written; `alone` where no other one writes any."""
        self._kept[id] = Entry(id, trial.number, None, trial=trial)
        if alone:
            self._last = max(self._last, id)

    def refresh(self) -> None:
        """Looks into the database. Raises what the storage and `trial_of` do."""
        found = self._storage._get_trials(
            self._study, states=None, included_trial_ids=self._open, trial_id_greater_than=self._last
        )
        for frozen in found:
            id, over = frozen._trial_id, frozen.state.is_finished()
            if over and not is_finished(frozen):  # abandoned
                self._kept.pop(id, None)
            elif not over or id not in self._kept or self._kept[id].trial is None:
                self._kept[id] = self._entry(frozen, over)
            (self._open.discard if over else self._open.add)(id)
        self._last = max([self._last, *(frozen._trial_id for frozen in found)])

    def _entry(self, frozen: FrozenTrial, over: bool) -> Entry:
        attrs = frozen.user_attrs
        entry = Entry(frozen._trial_id, attrs.get("number"), attrs.get(RUN))
        if over:
            entry.trial = self._trial_of(frozen)
        else:
            entry.about, entry.waiting = attrs, frozen.state.name == "WAITING"
        return entry
