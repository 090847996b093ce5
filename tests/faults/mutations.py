"""Takes protections out one at a time, in a copy of the sources, and runs the test that should notice.

    python tests/faults/mutations.py            all
    python tests/faults/mutations.py 3 7        some of them

A protection whose removal no test notices is reported, and the exit code is 1. Rejected: mutating every operator of
every file. That is days of work for two cores and finds weak tests of everything else first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FAULTS = "tests/faults/test_fault_runs.py"
DAMAGED = "tests/faults/test_damaged_files.py"
NEWCOMERS = "tests/faults/test_newcomers.py"
LEFT_BEHIND = (".git", ".venv*", "runs", ".cache*", "build", "*.egg-info")


@dataclass(frozen=True)
class Mutation:
    """One protection less.

    Attributes:
        what: the protection.
        file: where it is.
        old: text that is replaced, once.
        new: by this.
        test: what notices, as pytest takes it.
    """

    what: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = [
    Mutation(
        "files appear whole",
        "engine/files.py",
        "            yield temporary\n            _fsync(temporary)\n",
        "            os.replace(temporary, target)\n            yield target\n            _fsync(target)\n"
        "            return\n",
        f"{DAMAGED}::test_a_refusing_disk_is_named_with_the_final_file_and_leaves_the_old_one",
    ),
    Mutation(
        "leftovers of killed writers are removed",
        "engine/files.py",
        "    found = [p for p in",
        "    found = [p for p in () for p in",
        f"{DAMAGED}::test_leftovers_of_killed_writers_are_removed_and_nothing_else",
    ),
    Mutation(
        "the state before the last one is kept",
        "engine/files.py",
        "if previous is not None and target.exists():",
        "if False:",
        f"{DAMAGED}::test_any_damage_of_a_training_state_is_noticed_and_the_one_before_used",
    ),
    Mutation(
        "checksum of a training state",
        "engine/training/checkpoint.py",
        "if seal == _SEAL + hashlib.sha256(body).digest():",
        "if True:",
        f"{DAMAGED}::test_any_damage_of_a_training_state_is_noticed_and_the_one_before_used",
    ),
    Mutation(
        "second copy of weights",
        "engine/training/checkpoint.py",
        "            tensors = _read_weights(copy)\n",
        "            raise _Unsound('is not looked for')\n",
        f"{DAMAGED}::test_any_damage_of_weights_is_noticed_and_their_copy_used",
    ),
    Mutation(
        "checksum of a trial",
        "search/ledger/records.py",
        'if attrs.get("check", _check_sum(trial)) != _check_sum(trial):',
        "if False:",
        f"{DAMAGED}::test_a_damaged_ledger_is_replaced_by_its_copy",
    ),
    Mutation(
        "copy of the ledger",
        "search/ledger/copy.py",
        "            source.backup(target)\n",
        "            pass\n",
        f"{DAMAGED}::test_a_damaged_ledger_is_replaced_by_its_copy",
    ),
    Mutation(
        "one process at a time in a run directory",
        "search/rundir.py",
        "            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        f"{FAULTS}::test_a_ledger_locked_by_another_process_is_named",
    ),
    Mutation(
        "steps with overflowed gradients are left out",
        "engine/training/optim.py",
        "    skipped = 1.0 - norm.isfinite().float()",
        "    skipped = torch.zeros_like(norm)",
        "tests/faults/test_determinism.py::test_a_step_with_an_overflowed_gradient_changes_nothing",
    ),
    Mutation(
        "wrong kernels are taken out of service",
        "engine/training/sentinel.py",
        "            if apart > limit:",
        "            if False:",
        "tests/faults/test_determinism.py::test_the_sentinel_takes_wrong_kernels_out_of_service",
    ),
    Mutation(
        "a loss that is not finite ends the phase",
        "engine/training/loop.py",
        "if not all(map(math.isfinite, means)):",
        "if False:",
        f"{FAULTS}::test_a_loss_that_is_not_finite_ends_in_one_line_with_a_remedy",
    ),
    Mutation(
        "lack of memory is told from other errors",
        "engine/exhaustion.py",
        "any(text in str(error) for text in _TEXTS)",
        "False",
        "tests/faults/test_determinism.py::test_lack_of_memory_is_known_by_all_its_names",
    ),
    Mutation(
        "lack of memory in a phase ends in one line",
        "search/cli.py",
        "        if is_out_of_memory(error):\n            return _machine_failed(error, _OUT_OF_MEMORY)\n",
        "",
        f"{FAULTS}::test_without_memory_in_a_phase_the_run_ends_in_one_line_and_resumes",
    ),
    Mutation(
        "programs are validated",
        "kernels/language/validation.py",
        "    if encode(segments, form, policy, rule, flags) != words:",
        "    if False:",
        "tests/kernels/test_program.py",
    ),
    Mutation(
        "nesting of expressions is bounded",
        "kernels/language/expression.py",
        "MAX_DEPTH = 64",
        "MAX_DEPTH = 1 << 30",
        "tests/faults/test_fuzz.py::test_size_costs_neither_time_nor_memory",
    ),
    Mutation(
        "a full disk has a remedy",
        "search/cli.py",
        "    if error.errno not in DISK_ERRORS:",
        "    if True:",
        f"{NEWCOMERS}::test_10_a_full_disk",
    ),
    Mutation(
        "old versions are refused",
        "search/console/environment.py",
        "        if tuple(int(part)",
        "        if False and tuple(int(part)",
        f"{NEWCOMERS}::test_4_an_old_pytorch",
    ),
    Mutation(
        "another package named kernels is refused",
        "search/console/environment.py",
        '    if not any((place / "language/expression.py").is_file() for place in places):',
        "    if False:",
        f"{NEWCOMERS}::test_5_hugging_faces_package_kernels",
    ),
    Mutation(
        "a tokenizer of another model is refused",
        "engine/teacher/adapter.py",
        "if tokenizer.vocab_size > config.vocab_size:",
        "if False:",
        f"{NEWCOMERS}::test_6_a_tokenizer_of_another_model",
    ),
    Mutation(
        "trials are kept as text",
        "search/ledger/records.py",
        "sys.intern(str(architecture))",
        "architecture",
        "tests/faults/test_long_runs.py::test_a_remembered_trial_is_small",
    ),
    Mutation(
        "the ledger keeps no copy of Optuna's entries",
        "search/ledger/ledger.py",
        "self.storage.create_new_trial(study._study_id, frozen)",
        "(study.add_trial(frozen), self.storage.get_all_trials(study._study_id)[-1]._trial_id)[1]",
        "tests/faults/test_long_runs.py::test_a_remembered_trial_is_small",
    ),
    Mutation(
        "caches have a bound",
        "kernels/language/canonical.py",
        "@lru_cache(maxsize=EXPRESSIONS)",
        "@lru_cache(maxsize=None)",
        "tests/faults/test_long_runs.py::test_every_cache_has_a_bound",
    ),
    Mutation(
        "packed weights are those of unchanged parameters",
        "kernels/backends/packed_weights.py",
        " and known.state == state:",
        ":",
        "tests/kernels/test_packed_weights.py::test_changed_weights_are_noticed",
    ),
    Mutation(
        "writes past PyTorch are noticed",
        "kernels/backends/packed_weights.py",
        "self._library.ffnas_samples(address, stride, dtype, rows, columns)",
        "0",
        "tests/kernels/test_packed_weights.py::test_changed_weights_are_noticed",
    ),
]


def noticed(mutation: Mutation, copy: Path) -> bool:
    """Whether the test fails without the protection."""
    path = copy / mutation.file
    sound = path.read_text()
    if sound.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file}: {mutation.old!r} is there {sound.count(mutation.old)} times: mend the list")
    path.write_text(sound.replace(mutation.old, mutation.new))
    try:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", mutation.test]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    finally:
        path.write_text(sound)
    if done.returncode not in (0, 1) and done.returncode >= 0:  # below 0: the test's process crashed
        raise SystemExit(f"{mutation.test}: pytest ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.returncode != 0


def main() -> int:
    chosen = [int(n) for n in sys.argv[1:]] or range(len(MUTATIONS))
    missed = 0
    with tempfile.TemporaryDirectory(prefix="ffnas-mutations-") as folder:
        copy = Path(folder) / "ffnas"
        shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
        for number in chosen:
            found = noticed(MUTATIONS[number], copy)
            missed += not found
            print(f"{number:2} {'noticed' if found else 'MISSED '}  {MUTATIONS[number].what}", flush=True)
    print(f"{len(chosen)} protections taken out, {len(chosen) - missed} noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
