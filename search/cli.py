"""The `ffnas` command: picks the subcommand, maps errors and interruptions to exit codes.

Exit codes: 0 done, 2 wrong input (one line on standard error), 3 another process of the run was lost, 4 the machine
failed it (disk, memory), 130 interrupted, 141 nobody reads the output any more, 143 terminated. Of several processes
(`torchrun`) the first one speaks, except about a lost one. A subcommand is imported only when it is called, so that
`ffnas --help` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

COMMANDS = {
    "data": ("search.commands.data", "show what a search would make of your files, without one"),
    "search": ("search.run", "search an architecture, derive the model, write the report"),
    "shrink": ("search.shrink", "a smaller, faster copy of a model, made of its own best parts"),
    "join": ("search.commands.join", "help a search that shares its ledger"),
    "teacher": ("search.commands.teacher", "fine-tune a teacher on a task, or find it in the cache"),
    "convert": ("search.commands.convert", "published EfficientBERT checkpoints to model directories, and back"),
    "derive": ("search.commands.derive", "distil a given architecture or preset, without a search"),
    "export": ("search.commands.export", "a model as torch.export program, ONNX and int8 ONNX"),
    "presets": ("search.commands.presets", "models known by name, with parameters, FLOPs and recipes"),
    "prepare": ("search.commands.prepare", "tokenize and pack pre-training text into shards"),
    "predict": ("search.commands.predict", "answer rows of a file or of a published split, GLUE submissions included"),
    "latency": ("search.commands.latency", "measure a latency table of this device, or compare models"),
    "doctor": ("search.commands.doctor", "what this machine has, what is off and why, a self-test: for bug reports"),
    "report": ("search.commands.report", "build the report of a run directory again"),
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    try:
        code = _main(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _nobody_reads()


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"ffnas {version('ffnas')}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"ffnas: unknown command {argv[0]!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module = COMMANDS[argv[0]][0]
    return guarded(lambda rest: importlib.import_module(module).command(rest), argv[1:], old=argv[0] == "doctor")


def guarded(command: Callable[[list[str]], None], argv: list[str], *, old: bool = False) -> int:
    """Runs a subcommand; wrong input ends in one line and exit code 2, an interruption in 130 or 143.

    Args:
        command: the subcommand.
        argv: what it is given.
        old: run it with versions that are too old, too.
    """
    if not _ready(old):
        return 2
    from engine.errors import ToldElsewhere, UserError
    from kernels.language.expression import ExpressionError

    show = warnings.showwarning
    warnings.showwarning = partial(_show, show)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        command(argv)
    except ToldElsewhere:
        _let_the_first_speak()
        return 2
    except (UserError, ExpressionError) as error:
        print(f"ffnas: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as error:
        return _machine_failed(error, _disk_problem(error))
    except MemoryError as error:
        return _machine_failed(error, _OUT_OF_MEMORY)
    except RuntimeError as error:
        from engine.exhaustion import is_out_of_memory
        from engine.training.loop import Diverged

        if isinstance(error, Diverged):
            print(f"ffnas: error: {error}: choose a smaller learning rate for this phase", file=sys.stderr)
            return 2
        if is_out_of_memory(error):
            return _machine_failed(error, _OUT_OF_MEMORY)
        if not _rank_lost(error):
            raise
        rank = os.environ.get("RANK")
        print(f"ffnas: rank {rank}: {error}; finished work is kept (--resume goes on)", file=sys.stderr)
        # a collective may still be waiting for the lost process in another thread: leave without its destructors
        sys.stderr.flush()
        os._exit(3)
    except KeyboardInterrupt:
        _say("interrupted; finished work is kept (--resume goes on)")
        return 130
    except SystemExit as stop:
        if stop.code == 143:
            _say("terminated; finished work is kept (--resume goes on)")
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        signal.signal(signal.SIGTERM, previous)
        warnings.showwarning = show
    return 0


def _ready(old: bool) -> bool:
    """Whether this environment can run anything (`old`: with versions that are too old, too); tells why not."""
    from search.console.waiting import wait_briefly

    wait_briefly()
    from engine.errors import UserError
    from search.console.environment import check_names, check_versions, give_home

    try:
        check_names()
        if not old:
            check_versions()
    except UserError as error:
        print(f"ffnas: error: {error}", file=sys.stderr)
        return False
    note = give_home()
    if note is not None:
        _say(note)
    return True


def _nobody_reads() -> int:
    """What read our output has ended (`ffnas presets | head -1`): so do we, as other programs do, without a word."""
    with contextlib.suppress(OSError, ValueError):  # what is left to be written at the end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _show(others: Callable[..., None], message: Warning | str, category: type[Warning], *rest: Any) -> None:
    """Our own warnings in one line, without the place in the code."""
    if category.__module__.startswith(("kernels.", "engine.", "search.")):
        print(f"ffnas: {str(message).removeprefix('ffnas').lstrip(': ')}", file=sys.stderr)
    else:
        others(message, category, *rest)


_OUT_OF_MEMORY = "out of memory: use smaller batches (accumulate, population) or a machine with more"


def _machine_failed(error: BaseException, problem: str | None) -> int:
    """Reports what was nobody's mistake in one line and gives its exit code; raises `error` if it is not that."""
    if problem is None:
        raise error
    print(f"ffnas: {problem}; finished work is kept (--resume goes on)", file=sys.stderr)
    return 4


def _disk_problem(error: OSError) -> str | None:
    from engine.files import DISK_ERRORS

    if error.errno not in DISK_ERRORS:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror}: {DISK_ERRORS[error.errno]}"


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"ffnas: {message}", file=sys.stderr)


def _let_the_first_speak(seconds: float = 60) -> None:
    """Waits to be ended by the launcher: it ends all ranks as soon as one fails, the one with the message, too."""
    with contextlib.suppress(SystemExit, KeyboardInterrupt):
        time.sleep(seconds)


def _rank_lost(error: RuntimeError) -> bool:
    from engine.training.parallel import RankLost

    return isinstance(error, RankLost)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: ffnas COMMAND ...   (ffnas COMMAND --help tells more)", "", "commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
