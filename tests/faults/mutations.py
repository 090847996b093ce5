"""Takes protections out one at a time, in a copy of the sources, and runs the test that should notice.

    python tests/faults/mutations.py            all
    python tests/faults/mutations.py 3 7        some of them

A protection is named by the definition it is in, not by a file: `Ledger.record` is looked up in the syntax trees of all
packages. Layout, comments and the place of the definition do not matter.

A protection whose removal no test notices is reported, and the exit code is 1. Rejected: mutating every operator of
every file. That is days of work for two cores and finds weak tests of everything else first.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "engine", "search")
FAULTS = "tests/faults/test_fault_runs.py"
DAMAGED = "tests/faults/test_damaged_files.py"
NEWCOMERS = "tests/faults/test_newcomers.py"
LEFT_BEHIND = (".git", ".venv*", "runs", ".cache*", "build", "*.egg-info")


@dataclass(frozen=True)
class Change:
    """In the only function, method, class or constant with this qualified name, `old` becomes `new`.

    `old` is an expression or a statement and is there once. A statement may become several.
    """

    name: str
    old: str
    new: str


@dataclass(frozen=True)
class Mutation:
    """One protection less: what it is, what takes it out, and the test that notices, as pytest takes it."""

    what: str
    change: Change
    test: str


MUTATIONS = [
    Mutation(
        "files appear whole",
        Change(
            "write_atomic", "yield temporary", "os.replace(temporary, target); yield target; _fsync(target); return"
        ),
        f"{DAMAGED}::test_a_refusing_disk_is_named_with_the_final_file_and_leaves_the_old_one",
    ),
    Mutation(
        "leftovers of killed writers are removed",
        Change("remove_leftovers", "Path(folder).rglob('.*')", "()"),
        f"{DAMAGED}::test_leftovers_of_killed_writers_are_removed_and_nothing_else",
    ),
    Mutation(
        "the state before the last one is kept",
        Change("write_atomic", "previous is not None and target.exists()", "False"),
        f"{DAMAGED}::test_any_damage_of_a_training_state_is_noticed_and_the_one_before_used",
    ),
    Mutation(
        "checksum of a training state",
        Change("_read_sealed", "seal == _SEAL + hashlib.sha256(body).digest()", "True"),
        f"{DAMAGED}::test_any_damage_of_a_training_state_is_noticed_and_the_one_before_used",
    ),
    Mutation(
        "second copy of weights",
        Change("load_weights", "tensors = _read_weights(copy)", "raise _Unsound('is not looked for')"),
        f"{DAMAGED}::test_any_damage_of_weights_is_noticed_and_their_copy_used",
    ),
    Mutation(
        "checksum of a trial",
        Change("from_optuna", "attrs.get('check', _check_sum(trial)) != _check_sum(trial)", "False"),
        f"{DAMAGED}::test_a_damaged_ledger_is_replaced_by_its_copy",
    ),
    Mutation(
        "copy of the ledger",
        Change("LedgerCopy.write", "source.backup(target)", "None"),
        f"{DAMAGED}::test_a_damaged_ledger_is_replaced_by_its_copy",
    ),
    Mutation(
        "one process at a time in a run directory",
        Change("RunDir._acquire", "fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "None"),
        f"{FAULTS}::test_a_ledger_locked_by_another_process_is_named",
    ),
    Mutation(
        "steps with overflowed gradients are left out",
        Change("clipped_step", "1.0 - norm.isfinite().float()", "torch.zeros_like(norm)"),
        "tests/faults/test_determinism.py::test_a_step_with_an_overflowed_gradient_changes_nothing",
    ),
    Mutation(
        "wrong kernels are taken out of service",
        Change("Sentinel._suspects", "apart > limit", "False"),
        "tests/faults/test_determinism.py::test_the_sentinel_takes_wrong_kernels_out_of_service",
    ),
    Mutation(
        "a loss that is not finite ends the phase",
        Change("_Losses.judge", "not all(map(math.isfinite, means))", "False"),
        f"{FAULTS}::test_a_loss_that_is_not_finite_ends_in_one_line_with_a_remedy",
    ),
    Mutation(
        "lack of memory is told from other errors",
        Change("is_out_of_memory", "any(text in str(error) for text in _TEXTS)", "False"),
        "tests/faults/test_determinism.py::test_lack_of_memory_is_known_by_all_its_names",
    ),
    Mutation(
        "lack of memory in a phase ends in one line",
        Change("guarded", "is_out_of_memory(error)", "False"),
        f"{FAULTS}::test_without_memory_in_a_phase_the_run_ends_in_one_line_and_resumes",
    ),
    Mutation(
        "programs are validated",
        Change("validate_program", "encode(segments, form, policy, rule, flags) != words", "False"),
        "tests/kernels/test_program.py",
    ),
    Mutation(
        "nesting of expressions is bounded",
        Change("_Parser.expression", "depth > MAX_DEPTH", "False"),
        "tests/faults/test_fuzz.py::test_size_costs_neither_time_nor_memory",
    ),
    Mutation(
        "a full disk has a remedy",
        Change("_disk_problem", "error.errno not in DISK_ERRORS", "True"),
        f"{NEWCOMERS}::test_10_a_full_disk",
    ),
    Mutation(
        "old versions are refused",
        Change("check_versions", r"tuple(int(part) for part in re.findall(r'\d+', version)[:2]) < oldest", "False"),
        f"{NEWCOMERS}::test_4_an_old_pytorch",
    ),
    Mutation(
        "another package named kernels is refused",
        Change("check_names", "not any((place / 'language/expression.py').is_file() for place in places)", "False"),
        f"{NEWCOMERS}::test_5_hugging_faces_package_kernels",
    ),
    Mutation(
        "a tokenizer of another model is refused",
        Change("require_rows", "highest > rows", "False"),
        f"{NEWCOMERS}::test_6_a_tokenizer_of_another_model",
    ),
    Mutation(
        "trials are kept as text",
        Change("PackedArchitecture.__set__", "sys.intern(str(architecture))", "architecture"),
        "tests/faults/test_long_runs.py::test_a_remembered_trial_is_small",
    ),
    Mutation(
        "the ledger keeps no copy of Optuna's entries",
        Change(
            "Ledger.record",
            "self.storage.create_new_trial(study._study_id, frozen)",
            "(study.add_trial(frozen), self.storage.get_all_trials(study._study_id)[-1]._trial_id)[1]",
        ),
        "tests/faults/test_long_runs.py::test_a_remembered_trial_is_small",
    ),
    Mutation(
        "caches have a bound",
        Change("canonicalize", "EXPRESSIONS", "None"),
        "tests/faults/test_long_runs.py::test_every_cache_has_a_bound",
    ),
    Mutation(
        "packed weights are those of unchanged parameters",
        Change("PackedWeights.find", "known.sums != now", "False"),
        "tests/kernels/test_weight_writes.py::test_changed_weights_are_noticed",
    ),
]


class _Replacing(ast.NodeTransformer):
    """Puts `new` where `old` is, and counts how often that was."""

    def __init__(self, old: str, new: str) -> None:
        before: ast.AST = ast.parse(old).body[0]
        self.after: ast.AST | list[ast.stmt] = ast.parse(new).body
        match before, self.after:
            case ast.Expr(value=expression), [ast.Expr(value=other)]:
                before, self.after = expression, other
        self.before = ast.dump(before)
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        if ast.dump(node) != self.before:
            return self.generic_visit(node)
        self.count += 1
        return self.after


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Everything below `node` that has a name, with that name."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield prefix + name, child
                yield from _definitions(child, f"{prefix}{name}.")
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, child
            case _:
                yield from _definitions(child, prefix)


def changed(change: Change, root: Path) -> tuple[Path, str]:
    """The file below `root` the change is in, and its text with it. Exits where it cannot be made exactly once."""
    found = []
    for path in (p for package in PACKAGES for p in sorted((root / package).rglob("*.py"))):
        text = path.read_text()
        if all(part in text for part in change.name.split(".")):  # parsing every file takes seconds
            found += [(path, text, node) for name, node in _definitions(ast.parse(text)) if name == change.name]
    if len(found) != 1:
        places = ", ".join(f"{path.relative_to(root)}:{node.lineno}" for path, _, node in found) or "nowhere"
        raise SystemExit(f"{change.name} is defined {len(found)} times ({places}): mend the list")
    path, text, node = found[0]
    first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    replacing = _Replacing(change.old, change.new)
    definition = ast.unparse(replacing.visit(node))
    if replacing.count != 1:
        raise SystemExit(f"{change.name}: {change.old!r} is there {replacing.count} times: mend the list")
    lines = text.split("\n")
    lines[first - 1 : node.end_lineno] = [textwrap.indent(definition, " " * node.col_offset)]
    return path, "\n".join(lines)


def noticed(mutation: Mutation, copy: Path) -> bool:
    """Whether the test fails without the protection."""
    path, text = changed(mutation.change, copy)
    sound = path.read_text()
    path.write_text(text)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", type=int, nargs="*", choices=range(len(MUTATIONS)), metavar="N", help="all if none")
    chosen = parser.parse_args().numbers or range(len(MUTATIONS))
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
