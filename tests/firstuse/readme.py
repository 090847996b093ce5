"""What README.md and docs/performance.md tell people to type, and how to find out whether it would work.

A command that is not run is started by its real entry point and stopped where the work begins: with the first file that
may lie on the hub, or with the libraries that every command quietens first. Until then its options, their values and
the files it names have been looked at.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from newcomer import REPO

from search.cli import COMMANDS, main
from search.config.options import parse

PROGRAMS = ("ffnas", ".venv/bin/ffnas", "make", "python", "pytest", "torchrun", "pip")
TEXT = "\n".join((REPO / page).read_text(encoding="utf-8") for page in ("README.md", "docs/performance.md"))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")
_OPTIONAL = re.compile(r"\[(--[^\]]*)\]")
_DRAWN = "►"
"""Blocks with arrows are drawings."""


class Command(NamedTuple):
    """A command, as README has it but in one line and without its comment."""

    text: str

    @property
    def words(self) -> list[str]:
        """As a shell would cut it; optional parts are taken. Of `echo TEXT | COMMAND`, the command."""
        words = shlex.split(_OPTIONAL.sub(r"\1", self.text), comments=True)
        return words[words.index("|") + 1 :] if "|" in words else words

    @property
    def echoed(self) -> str | None:
        """What `echo` hands to the command."""
        words = shlex.split(self.text, comments=True)
        return " ".join(words[1 : words.index("|")]) + "\n" if "|" in words else None


def blocks(text: str = TEXT) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return _FENCE.findall(text)


def snippets(text: str = TEXT) -> list[str]:
    """Python code of blocks."""
    return [content for language, content in blocks(text) if language == "python"]


def commands(text: str = TEXT) -> list[Command]:
    """Every command of blocks, and those in the text between them.

    Raises:
        AssertionError: a line of a block is neither code, nor a drawing, nor begins with one of `PROGRAMS`.
    """
    found = []
    for language, content in blocks(text):
        if language == "python" or _DRAWN in content:
            continue
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                if "|" in words:
                    assert words[0] == "echo", f"README: {line!r} begins with something else than echo"
                    words = words[words.index("|") + 1 :]
                assert words[0] in PROGRAMS, f"README: what is {line!r}? Add its program to readme.PROGRAMS"
                found.append(Command(_without_comment(line)))
    shown = [said for said in _spans(text) if said.split()[0] in PROGRAMS and said not in [*PROGRAMS, *named(text)]]
    return list(dict.fromkeys([*found, *(Command(said) for said in shown)]))


def named(text: str = TEXT) -> list[str]:
    """Commands that the text speaks of without an argument: `ffnas prepare`, `make setup`."""
    spoken = [said for said in _spans(text) if said.split()[0] in ("ffnas", "make") and len(said.split()) == 2]
    return list(dict.fromkeys(spoken))


def options(text: str = TEXT) -> list[str]:
    """Options of `ffnas search` as the text between blocks names them, with their values: `--seed 0`."""
    return list(dict.fromkeys(said for said in _spans(text) if said.startswith("--")))


def _spans(text: str) -> list[str]:
    return [" ".join(said.split()) for said in _INLINE.findall(_FENCE.sub("", text))]


def _without_comment(line: str) -> str:
    return " ".join(re.sub(r"\s#\s.*$", "", line).split())


class Started(BaseException):
    """The work would begin here; passes through everything that catches errors."""


def _start(*_arguments: object, **_options: object) -> None:
    raise Started


def _too_late(*_arguments: object, **_options: object) -> None:
    raise AssertionError("the work began")


def require_valid(words: Sequence[str], *, hub: bool = False) -> None:
    """Starts a command in the present folder and stops it where its work begins.

    Args:
        words: of the command.
        hub: stop before files and models are looked for, since some are on the hub.

    Raises:
        AssertionError: it would not get so far.
    """
    program, *rest = words
    if program.endswith("ffnas"):
        _require_ffnas(rest, hub)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(rest)
        assert (given.module, given.training_script) == (True, "search.run"), words
        _require_ffnas(["search", *given.training_script_args], hub)
    elif program == "make":
        _require_make(rest, hub)
    elif program == "python":
        assert rest[0] == "-m", words
        _require_module(rest[1], rest[2:])
    elif program == "pytest":
        assert all((REPO / word).exists() for word in rest if not word.startswith("-")), words
        assert {word for word in rest if word.startswith("-")} <= _benchmark_options(), words
    else:
        assert rest[0] == "install", words
        assert (REPO / "pyproject.toml").is_file()


def _require_ffnas(words: list[str], hub: bool) -> None:
    assert words[0] in COMMANDS, f"ffnas has no command {words[0]}"
    if len(words) == 1:  # named, not shown
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.console.libraries.quiet", _start)
        patch.setattr("engine.export.hub.push_to_hub", _start)
        patch.setattr("subprocess.Popen", _too_late)
        if hub:
            patch.setattr("search.config.inputs.read_inputs", _start)
        try:
            code = main(words)
        except Started:
            return
    raise AssertionError(f"ffnas {shlex.join(words)} ends with code {code} instead of beginning its work")


def _benchmark_options() -> set[str]:
    """Options that pytest has from pytest-benchmark."""
    from pytest_benchmark.plugin import pytest_addoption

    names: list[str] = []

    class Recorder:
        def getgroup(self, *_names: str) -> Recorder:
            return self

        def addoption(self, *given: str, **_options: object) -> None:
            names.extend(given)

    pytest_addoption(Recorder())
    return set(names)


def _require_make(words: list[str], hub: bool) -> None:
    target, *rest = words
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert target in targets, f"Makefile has no target {target}"
    for word in rest:
        name, _, value = word.partition("=")
        assert (target, name) == ("search", "ARGS"), word
        _require_ffnas(["search", *shlex.split(value)], hub)


def _require_module(name: str, words: list[str]) -> None:
    """A module's own parser takes the options, and the files named are there."""
    known = argparse.ArgumentParser.parse_known_args

    def parse_args(parser: argparse.ArgumentParser, args: Sequence[str] | None = None) -> None:
        _, rest = known(parser, args)
        if rest:
            parser.error(f"unrecognized arguments: {rest}")
        raise Started

    def parse_known_args(parser: argparse.ArgumentParser, args: Sequence[str] | None = None) -> None:
        _, rest = known(parser, args)  # what is left is handed on to ffnas search
        parse(rest)
        raise Started

    assert all((REPO / word).exists() for word in words if word.endswith(".json")), words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr("subprocess.Popen", _too_late)
        patch.setattr(sys, "argv", [name, *words])
        module = importlib.import_module(f"{name}.__main__" if (REPO / Path(*name.split("."))).is_dir() else name)
        try:
            module.main()
        except Started:
            return
        except SystemExit as stop:
            raise AssertionError(f"python -m {name} {shlex.join(words)} ends with {stop.code}") from stop
    raise AssertionError(f"python -m {name}: no parser was asked")
