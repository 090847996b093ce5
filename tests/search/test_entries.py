"""What is read of a study and what is kept of it."""

import pytest

from engine.architecture.architecture import Architecture
from engine.errors import UserError
from search.ledger.ledger import Ledger
from search.ledger.records import Candidate, Trial
from search.ledger.shared_board import LedgerBoard
from search.scoring.trials import TrialLog

A = Architecture.parse("linear1_1(gelu(linear1_1(x,wb1)),wb2)")


def trial(number, score=0.5, **changes):
    return Trial("s", number, A, f"k{number}", score, 5, 1.0, **changes)


@pytest.fixture
def read(monkeypatch):
    """How many entries each look into a database fetched."""
    from optuna.storages import RDBStorage

    counts, inner = [], RDBStorage._get_trials

    def counted(self, *args, **kwargs):
        found = inner(self, *args, **kwargs)
        counts.append(len(found))
        return found

    monkeypatch.setattr(RDBStorage, "_get_trials", counted)
    return counts


def test_the_ledger_of_one_process_reads_no_entry_twice(tmp_path, read):
    with Ledger(tmp_path / "study.db") as ledger:
        for number in range(4):
            ledger.record(trial(number))
    with Ledger(tmp_path / "study.db") as ledger:
        assert len(ledger.trials("s")) == 4
        ledger.record(trial(4))
        assert ledger.trials("s") == [trial(n) for n in range(5)]
        ledger.record(trial(5))
        ledger.trials("s")
    assert sum(read) == 4


def test_a_look_at_a_shared_ledger_reads_what_is_new_or_open(tmp_path, read):
    url = f"sqlite:///{tmp_path}/shared.db"
    with (
        Ledger(url, run="r") as one,
        Ledger(url, run="r") as other,
        LedgerBoard(one, "s", {"a": 1}) as first,
        LedgerBoard(other, "s", {"a": 1}) as second,
    ):
        first.settle([Candidate(n, A, f"k{n}", 5) for n in range(6)])
        second.settle([Candidate(n, A, f"k{n}", 5) for n in range(6)])
        assert first.claim(list(range(5)), 5, whole=False) == [0, 1, 2, 3, 4]
        for number in range(5):
            first.finish(trial(number))
        assert list(second.finished()) == [0, 1, 2, 3, 4]
        assert list(second._candidates) == [5]
        del read[:]
        for _ in range(3):
            assert len(second.finished()) == 5
        assert read == [1, 1, 1]  # the one that waits
        assert second.claim([5], 1, whole=False) == [5]
        second.finish(trial(5))
        assert first.finished()[5] == trial(5)


def test_a_damaged_entry_is_reported_at_every_look(tmp_path):
    with Ledger(tmp_path / "study.db") as ledger:
        ledger.record(trial(0))
        study, _ = ledger.study("s")
        import optuna

        study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.COMPLETE, value=1.0))
    with Ledger(tmp_path / "study.db") as ledger:
        for _ in range(2):
            with pytest.raises(UserError, match="was not written by ffnas or is damaged"):
                ledger.trials("s")


def test_a_record_gives_the_architecture_it_was_made_of():
    kron = Architecture.parse("linear3_4(max(tanh(kron3_4(x,wb1)),x),wb2), linear1_1(gelu(linear1_1(x,wb1)),wb2)")
    record = Trial("s", 0, kron, "k", 0.5, 5, 1.0)
    assert record.architecture == kron
    assert Trial.from_dict(record.to_dict()) == record
    assert record == Trial("s", 0, kron, "k", 0.5, 5, 1.0) != trial(0)
    with pytest.raises(TypeError):
        Trial("s", 0)


def test_the_log_counts_failures_and_keeps_the_best_as_trials_come():
    log = TrialLog()
    assert log.note() == ""
    log.add([trial(0, 0.25), trial(1, None, state="failed", reason="diverged at step 3")])
    log.add([trial(2, 0.75, state="pruned", reason="stopped")])
    log.add([trial(3, None, state="failed", reason="diverged at step 9")])
    log.add([trial(4, 0.5)])
    assert log.note() == "best 0.5000"
    assert log.failures == {"diverged at step #": 2}
    assert [t.number for t in log.trials] == [0, 1, 2, 3, 4]
