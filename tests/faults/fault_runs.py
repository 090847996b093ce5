"""Tiny whole searches in forked processes, which can be killed, starved and handed broken disks.

Importing PyTorch and transformers takes seconds, a tiny search one or two. So a *nursery* process imports everything
once and forks a child per run; it never trains itself, so there are no threads a fork would lose. Faults are
functions of `fault_injections`, called in the child before the search begins.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
WORDS = {"bad": ["awful", "poor", "sad", "worst"], "good": ["great", "lovely", "best", "happy"]}
FILLER = ["the", "a", "phone", "film", "story", "was", "is", "it", "very", "today"]


def write_task(path: Path, rows: int, seed: int) -> None:
    rng = random.Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence", "label"])
        for _ in range(rows):
            label = rng.choice(sorted(WORDS))
            words = rng.choices(FILLER, k=rng.randint(2, 6)) + rng.choices(WORDS[label], k=2)
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])


def make_inputs(folder: Path) -> None:
    """train.csv, dev.csv and teacher/ (random weights, its own vocabulary)."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    write_task(folder / "train.csv", 240, seed=1)
    write_task(folder / "dev.csv", 40, seed=2)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, *WORDS["bad"], *WORDS["good"]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def options(inputs: Path, runs: Path, name: str) -> list[str]:
    """A search below the smoke preset: every phase, two or three steps each, a checkpoint after every second one."""
    values = {
        "preset": "smoke",
        "precision": "fp32",
        "teacher_precision": "fp32",
        "runs": runs,
        "name": name,
        "teacher": inputs / "teacher",
        "data.train": inputs / "train.csv",
        "data.dev": inputs / "dev.csv",
        "data.max_length": 16,
        "data.min_held_out": 20,
        "data.max_text": 60,
        "student.hidden_size": 12,
        "student.embedding_size": 8,
        "finetune.max_steps": 4,
        "warmup.steps": 5,
        "stage1.task.steps": 2,
        "stage2.task.steps": 2,
        "stage3.trials": 3,
        "derive.task.steps": 5,
        "derive.evaluations": 2,
        "checkpoint_every": 2,
        "threads": 1,
        "baselines.gelu": "false",
        "baselines.random": "false",
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def outcome(folder: Path) -> dict:
    """What must not depend on faults: every trial and its score to the last bit, the found architecture, its weights
    and its metrics."""
    from search.ledger.ledger import Ledger

    with Ledger(folder / "study.db") as ledger:
        trials = [
            (t.stage, t.number, t.key, t.state, None if t.score is None else t.score.hex())
            for stage in ledger.stages()
            for t in ledger.trials(stage)
        ]
    summary = json.loads((folder / "summary.json").read_text())
    weights = (folder / "best" / "model" / "model.safetensors").read_bytes()
    return {
        "trials": trials,
        "architecture": json.loads((folder / "best" / "architecture.json").read_text()),
        "weights": hashlib.sha256(weights).hexdigest(),
        **{key: summary[key] for key in ("best", "teacher", "task", "seed")},
    }


def unfinished_files(folder: Path) -> list[str]:
    """Files in a run directory that cannot be read by what reads them: must be none, whenever a run was killed."""
    from safetensors import safe_open

    bad = []
    for path in folder.rglob("*"):
        if not path.is_file() or path.name.startswith("."):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as file:
                    for name in file.files:
                        file[name]
            elif path.suffix == ".safetensors":
                with safe_open(str(path), "pt") as file:
                    _ = [file.get_tensor(n) for n in file.keys()]  # noqa: SIM118
            elif path.suffix == ".pt":
                body = path.read_bytes()
                assert body[-32:] == hashlib.sha256(body[:-44]).digest()
            elif path.suffix == ".html":
                assert path.read_text().rstrip().endswith("</html>")
        except Exception as error:
            bad.append(f"{path.relative_to(folder)}: {error!r:.100}")
    return bad


@dataclass
class Ended:
    """How a child ended: exit code (negative: signal), what it printed, how long it ran, what it killed it in."""

    code: int
    out: str
    err: str
    seconds: float


class Nursery:
    """Forks searches. Use as a context manager."""

    def __enter__(self) -> Nursery:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(
        self,
        argv: list[str],
        cache: Path,
        *,
        kill_after: float | None = None,
        signum: int = signal.SIGKILL,
        when: Path | None = None,
        inject: str | None = None,
        file_limit: int | None = None,
        obeys_rights: bool = False,
        plots: bool = False,
        timeout: float = 600.0,
    ) -> Ended:
        """Runs `ffnas search argv` in a child.

        Args:
            argv: options.
            cache: its FFNAS_CACHE.
            kill_after: seconds after the search began at which the child gets `signum`.
            signum: that signal.
            when: send the signal when this path exists.
            inject: `name` or `name:argument` of a function of `fault_injections`.
            file_limit: largest size of a file, bytes: the disk is full beyond.
            obeys_rights: a superuser's child loses the right to read and write whatever it likes.
            plots: draw the report's figures (half of a tiny run's time); otherwise empty ones are written.
            timeout: seconds after which the child is killed and an error raised.
        """
        request = {
            "argv": argv,
            "cache": str(cache),
            "kill_after": kill_after,
            "signum": int(signum),
            "when": None if when is None else str(when),
            "inject": inject,
            "file_limit": file_limit,
            "obeys_rights": obeys_rights,
            "plots": plots,
            "timeout": timeout,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer.pop("hung"):
            raise TimeoutError(f"the run hung: {answer}")
        return Ended(**answer)

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the nursery process died")
        return json.loads(line)


def _obey_rights() -> None:
    """Gives up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (Linux), so that the bits of files and directories count.

    Becoming another user instead would lose the interpreter's own files where only the superuser may read them.
    """
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for k in range(3):
        sets[k] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _child(request: dict, out: int, err: int) -> None:
    """Becomes the search; never returns."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.environ["FFNAS_CACHE"] = request["cache"]
        if request["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
        if request["obeys_rights"]:
            _obey_rights()
        if not request["plots"]:
            _empty_figures()
        if request["inject"]:
            import fault_injections

            name, _, argument = request["inject"].partition(":")
            getattr(fault_injections, name)(*([argument] if argument else []))
        import search.run
        from search.cli import guarded

        code = guarded(search.run.command, request["argv"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _empty_figures() -> None:
    from matplotlib.figure import Figure

    save = Figure.savefig

    def savefig(_self: Figure, target: object, **options: object) -> None:
        save(Figure(figsize=(1, 1)), target, format=options.get("format"))

    Figure.savefig = savefig


def _serve_one(request: dict, folder: Path) -> dict:
    out, err = (os.open(folder / n, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for n in ("out", "err"))
    began = time.monotonic()
    child = os.fork()
    if not child:
        _child(request, out, err)
    deadline = began + request["timeout"]
    kill_at = None if request["kill_after"] is None else began + request["kill_after"]
    when = None if request["when"] is None else Path(request["when"])
    hung, done, status = False, 0, 0
    while not done:
        done, status = os.waitpid(child, os.WNOHANG)
        now = time.monotonic()
        if not done and ((kill_at is not None and now >= kill_at) or (when is not None and when.exists())):
            os.kill(child, request["signum"])
            kill_at = when = None
        elif not done and now > deadline:
            os.kill(child, signal.SIGKILL)
            hung = True
        select.select([], [], [], 0.002)
    texts = [os.pread(handle, 1 << 20, 0).decode(errors="replace") for handle in (out, err)]
    os.close(out)
    os.close(err)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "out": texts[0], "err": texts[1], "seconds": time.monotonic() - began, "hung": hung}


def _nursery() -> None:
    import tempfile

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import alembic.command  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import optuna
    import optuna.storages._rdb.storage
    import sklearn.metrics  # noqa: F401
    import sqlalchemy.dialects.sqlite  # noqa: F401
    import torch
    import transformers.models.bert.modeling_bert  # noqa: F401

    import search.context
    import search.pipeline
    import search.run  # noqa: F401
    from kernels.dispatch import load_backend

    torch.set_num_threads(1)
    load_backend("cpu")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="ffnas-faults-") as folder:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_serve_one(json.loads(line), Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    _nursery()
