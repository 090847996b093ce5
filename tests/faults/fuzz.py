"""Hostile input for everything that reads what a user gives: each input is accepted or refused in one line, quickly.

    python tests/faults/fuzz.py --parser 1000000
    python tests/faults/fuzz.py --architecture 100000 --config 500 --data 500 --ledger 2000 --checkpoint 2000

Inputs are mutations of a corpus that grows by coverage: every tenth is run under a line tracer of the module that
reads it, and one that reaches a new pair of lines joins the corpus. An input fails when it raises anything but the one
error meant for users, takes longer than `LIMIT` seconds, lets memory grow, or runs code (canaries in the corpus would
leave a file behind).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

from engine.architecture.file import load_architecture

LIMIT = 2.0
"""Longest an input may take, in seconds (CPU time: other processes do not count)."""
MAX_GROWTH = 512 << 20
"""Most bytes the process may grow by while fuzzing one target."""

FFN = "linear4_2(gelu(linear4_2(x,wb1)),wb2)"
CANARY = "__import__('os').system('touch CANARY')"


@dataclass
class Target:
    """One reader of hostile input.

    Attributes:
        run: reads an input; returns normally or raises one of `allowed`.
        allowed: errors meant for users.
        corpus: inputs to begin with.
        words: pieces that mean something to the reader.
        modules: ends of the file names whose lines guide.
    """

    run: Callable[[bytes], None]
    allowed: tuple[type[BaseException], ...]
    corpus: list[bytes]
    words: list[bytes]
    modules: tuple[str, ...]
    seen: set[tuple[str, int, int]] = field(default_factory=set)


def mutate(rng: Random, corpus: list[bytes], words: list[bytes]) -> bytes:
    """One to four random changes of an input of the corpus; long ones are taken seldom, or nothing else would run."""
    data = bytearray(rng.choice(corpus))
    while len(data) > 5000 and rng.random() < 0.999:
        data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind == 0 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 1:
            data[at:at] = rng.choice(words)
        elif kind == 2:
            del data[at : at + rng.randint(1, 12)]
        elif kind == 3:
            other = rng.choice(corpus)
            cut = rng.randrange(len(other) + 1)
            data[at:] = other[cut : cut + 2000]
        elif kind == 4:
            piece = data[at : at + rng.randint(1, 20)]
            data[at:at] = piece * rng.choice((1, 1, 2, 2, 70))
        elif kind == 5:
            data[at : at + 1] = rng.choice(words)
        elif kind == 6:
            data[at:at] = str(rng.choice((0, -1, 10**30, 2**63, 1e400, 65537))).encode()
        elif data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
    return bytes(data[: 1 << 20])


def fuzz(target: Target, count: int, seed: int) -> list[str]:
    """Runs `count` inputs; what failed, one line each."""
    rng, problems = Random(seed), []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for number in range(count):
        first = number < len(target.corpus)
        data = target.corpus[number] if first else mutate(rng, target.corpus, target.words)
        began = time.process_time()
        traced = number % 10 == 0
        try:
            new = _guided(target, data) if traced and len(data) < 5000 else target.run(data)
        except target.allowed as error:
            new = getattr(error, "_new_lines", False)
            if "\n" in str(error) and not traced:
                problems.append(f"message of several lines for {data[:80]!r}")
        except BaseException as error:
            problems.append(f"{type(error).__name__}: {str(error)[:200]} for {data[:200]!r}")
            if isinstance(error, KeyboardInterrupt):
                raise
            continue
        if new and len(target.corpus) < 5000 and len(data) < 5000:
            target.corpus.append(data)
        if time.process_time() - began > LIMIT * (5 if traced else 1):
            problems.append(f"{time.process_time() - began:.1f} s for {data[:80]!r}, {len(data)} bytes")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > MAX_GROWTH:
        problems.append(f"memory grew by {grown >> 20} MiB")
    if Path("CANARY").exists():
        problems.append("an input ran code")
    return problems


def _guided(target: Target, data: bytes) -> bool:
    """Runs under a tracer; whether a pair of lines was new."""
    found: set[tuple[str, int, int]] = set()
    last = 0

    def local(frame: FrameType, event: str, _arg: object) -> object:
        nonlocal last
        if event == "line":
            found.add((frame.f_code.co_name, last, frame.f_lineno))
            last = frame.f_lineno
        return local

    def tracer(frame: FrameType, _event: str, _arg: object) -> object:
        return local if frame.f_code.co_filename.endswith(target.modules) else None

    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        target.run(data)
    except target.allowed as error:
        sys.settrace(previous)
        new = not found <= target.seen
        target.seen |= found
        error._new_lines = new
        raise
    finally:
        sys.settrace(previous)
    new = not found <= target.seen
    target.seen |= found
    return new


def parser_target() -> Target:
    from kernels.language.expression import ExpressionError, parse_layers

    def run(data: bytes) -> None:
        text = data.decode("utf-8", errors="replace")
        layers = parse_layers(text)
        again = parse_layers(", ".join(map(str, layers)))
        assert again == layers, "printing and parsing again gives another expression"

    deep = "tanh(" * 5000 + "x" + ")" * 5000
    corpus = [
        FFN,
        "tanh(linear(gelu(linear(x,wb1)),wb2))",
        "linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), elu(linear2_1(add(linear2_1(x,wb1),x),wb2))",
        "mul(add(linear(swish(x),wb1),linear(leaky_relu(x),wb2)),sigmoid(x))",
        *(deep, CANARY, "(" * 60000, "linear9999_9999(x,wb1)", "x" * 10_000_000, "add(x," * 10000),
        *("x,x,x,x", "", "\x00", "١", "linear١_2(x,wb1)", "x\u2028,x"),
    ]
    names = ("linear", "linear4_2(", "add", "max", "gelu", "swish", "x", "wb1", "wb2", "(", ")", ",", "_", "0", "1")
    return Target(
        run, (ExpressionError,), [c.encode() for c in corpus], [n.encode() for n in names], ("expression.py",)
    )


def architecture_target(folder: Path) -> Target:
    from engine.errors import UserError

    path = folder / "architecture.json"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        load_architecture(path)

    layer = {"expression": "linear(gelu(linear(x,wb1)),wb2)", "stack": 4, "ratio": [1, 2]}
    whole = {"format": 1, "hidden_size": 540, "num_layers": 2, "layers": [layer, layer], "params": 15737724}
    corpus = [
        json.dumps(whole),
        "[" * 100_000,
        '{"format":' * 20_000,
        "NaN",
        '{"params": ' + "9" * 50_000 + "}",
        CANARY,
    ]
    words = [b'"', b"{", b"}", b"[", b"]", b":", b",", b"null", b"1e999", b"-0", b"NaN", b"true", *whole_words(whole)]
    return Target(run, (UserError,), [c.encode() for c in corpus], words, ("architecture.py",))


def whole_words(value: dict) -> list[bytes]:
    return [f'"{key}"'.encode() for key in (*value, "expression", "stack", "ratio")]


def config_target(folder: Path) -> Target:
    from engine.errors import UserError
    from search.config.options import parse, preset_path

    path = folder / "config.yaml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parse(["--config", str(path)])

    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n"
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):  # each nine times the one before: 9^10 entries
        bomb += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    corpus = [
        preset_path("smoke").read_text(),
        "seed: 1\nstage1: {trials: 5}\n",
        "budget: {params: [1e6, 2e6]}\n",
        "!!python/object/apply:os.system ['touch CANARY']\n",
        "seed: !!python/object/apply:os.system ['touch CANARY']\n",
        *(bomb, "[" * 3000, "a: " * 500, "- 1\n", "\x00", "seed: .nan\n", "config: config.yaml\n", "resume: x\n"),
        *("student: {hidden_size: 99999999999999999999}\n", "seed: " + "9" * 5000 + "\n", "data: {train: 3}\n"),
    ]
    words = [w.encode() for w in ("\n", ": ", "- ", "{", "}", "[", "]", "&a", "*a", "!!", "null", ".inf", "<<")]
    return Target(run, (UserError,), [c.encode() for c in corpus], words, ("options.py", "config.py", "checks.py"))


def data_target(folder: Path) -> Target:
    from engine.data.sources import read_documents, read_table
    from engine.errors import UserError

    def run(data: bytes) -> None:
        kind = (b".csv", b".jsonl", b".tsv", b".txt")[data[0] % 4 if data else 0].decode()
        path = folder / f"data{kind}"
        path.write_bytes(data[1:])
        if kind == ".txt":
            read_documents(str(path))
        else:
            table = read_table(str(path))
            for column in table.columns:
                table.values(column)

    corpus = [
        b'\x00sentence,label\nthe phone,good\n"a, b",bad\n',
        b'\x01{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n',
        b"\x02a\tb\tlabel\nx\ty\t1\n",
        b"\x03one document\n\ntwo\n",
        b"\x00a,b\n" + b"x" * 2_000_000 + b",1\n",
        b'\x01{"a": ' * 2000,
        b"\x00\xff\xfea,b\n",
        b"\x00a,a\n1,2\n",
        b'\x00a,b\n"unclosed,1\n',
        b"\x00",
        b'\x01{"a": 1e999}\n',
    ]
    words = [b",", b'"', b"\n", b"\r\n", b"\t", b"{", b"}", b'":', b"\x00", b"\xff", b"\xef\xbb\xbf", b"NaN", b"null"]
    return Target(run, (UserError,), corpus, words, ("sources.py", "filechecks.py"))


def ledger_target(folder: Path) -> Target:
    from engine.errors import UserError
    from search.ledger.ledger import Ledger

    def run(data: bytes) -> None:
        text = data.decode("utf-8", errors="replace")
        if "@" in text or ("//" in text and not text.startswith("sqlite")):
            text = text.replace("@", "@127.0.0.1:1/")  # no other machine is ever asked
        with Ledger(text, timeout=0.05) as ledger:
            ledger.stages()

    corpus = [
        *("study.db", "sqlite:///a.db", "sqlite://", "sqlite:///:memory:", "nosuch://x", "postgresql://a:b@h/x"),
        *(
            "",
            ".",
            "/",
            "\x00",
            "a" * 5000,
            "://",
            "sqlite:////nowhere/x.db",
            "mysql+pymysql://u:p@h/d",
            "sqlite:///%00",
        ),
        *("journal://x", "redis://h:1", "sqlite:///x?mode=ro", "sqlite+pysqlite:///b.db", "study.db/x"),
    ]
    words = [w.encode() for w in ("sqlite", "://", "/", "?", "%", ":", "mode=ro", "..", "\x00", "[", "]", "x.db")]
    return Target(run, (UserError,), [c.encode() for c in corpus], words, ("ledger.py",))


def checkpoint_target(folder: Path) -> Target:
    import pickle

    import torch

    from engine.architecture.architecture import Architecture
    from engine.errors import UserError
    from engine.published.convert import from_published
    from engine.published.files import read_published

    path, architecture = folder / "published.pt", Architecture.parse(FFN)

    def run(data: bytes) -> None:
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors = read_published(path)
            from_published(tensors, architecture)

    class Hostile:
        def __reduce__(self) -> tuple:
            return os.system, ("touch CANARY",)

    names = ("bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.attention.self.query.weight", "x")
    sound = io.BytesIO()
    torch.save({"state_dict": {f"module.{n}": torch.zeros(4, 4) for n in names}}, sound)
    legacy = io.BytesIO()
    torch.save({"state_dict": {names[0]: torch.zeros(2, 2)}}, legacy, _use_new_zipfile_serialization=False)
    corpus = [sound.getvalue(), legacy.getvalue(), pickle.dumps({"state_dict": Hostile()}), pickle.dumps(3), b"", b"PK"]
    return Target(run, (UserError,), corpus, [b"\x80\x02", b"}", b"q", b"torch", b"\xff" * 8], ("convert.py",))


TARGETS: dict[str, Callable[[Path], Target]] = {
    "parser": lambda _: parser_target(),
    "architecture": architecture_target,
    "config": config_target,
    "data": data_target,
    "ledger": ledger_target,
    "checkpoint": checkpoint_target,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in TARGETS:
        parser.add_argument(f"--{name}", type=int, default=0, help="inputs")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="ffnas-fuzz-") as folder:
        os.chdir(folder)
        for name, make in TARGETS.items():
            count = getattr(arguments, name)
            if not count:
                continue
            began, target = time.monotonic(), make(Path(folder))
            problems = fuzz(target, count, arguments.seed)
            failed |= bool(problems)
            seconds = time.monotonic() - began
            print(f"{name}: {count} inputs, corpus {len(target.corpus)}, {len(problems)} problems, {seconds:.0f} s")
            print(*sorted(set(problems))[:20], sep="\n")
        os.chdir("/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
