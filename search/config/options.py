"""Command-line options and configuration files of a search, read with jsonargparse.

Order, later wins: built-in defaults, `--preset`, then `--config FILE` and single options as written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from engine.errors import UserError
from engine.files import copy_atomic, write_text_atomic
from search.config.checks import validate
from search.config.pairs import unset_by_option, unset_by_values
from search.config.schema import BudgetConfig, SearchConfig
from search.config.words import MODE, install, joined, tracker_of
from search.ledger.url import without_password

EXAMPLES = """
examples:
  ffnas search                                        the embedded demo (teacher, text and task included)
  ffnas search --data.train a.csv --data.dev b.csv    your own task: CSV, TSV, JSONL, Parquet or a hub name
  ffnas search --teacher bert-base-uncased            another teacher: hub name or local directory
  ffnas search --budget.params 15e6 16e6              parameters of the found model, lowest and highest
  ffnas search --budget.latency-ms 8                  at most 8 ms on this device (one thread, one sequence)
  ffnas search --objectives score,latency             the front of score against latency
  ffnas search --preset paper --config my.yaml        start from a preset, change what my.yaml says
  ffnas search --space.file my-space.yaml             operators, heights, stacks, ratios of your own
  ffnas search --resume runs/NAME                     go on after an interruption
  ffnas search --resolve runs/NAME --budget.latency-ms 8      the same run under another budget, in seconds
  ffnas search --name NAME --ledger postgresql://...  candidates shared with workers: ffnas join runs/NAME
"""


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line breaks."""


MAX_CONFIG_BYTES = 1 << 20
MAX_CONFIG_DEPTH = 20


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("search") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """File of a preset; raises `UserError` naming the known ones."""
    if name not in preset_names():
        raise UserError(f"preset: {name!r} is not known: choose one of {', '.join(preset_names())}")
    return Path(str(resources.files("search") / "presets" / f"{name}.yaml"))


def build_parser(prog: str = "ffnas search") -> ArgumentParser:
    """The parser of `ffnas search` (equal to `python -m search.run`)."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    install()
    parser = ArgumentParser(
        prog=prog,
        parser_mode=MODE,
        description="Make a small, fast BERT-like encoder of a teacher, for a task.",
        epilog=EXAMPLES,
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the values below.")
    parser.add_argument("--resume", type=str, default=None, help="Run directory to continue; takes its own config.")
    parser.add_argument(
        "--resolve", type=str, default=None, help="Finished run to answer again under the --budget given; no training."
    )
    parser.add_class_arguments(SearchConfig, as_group=False)
    return parser


def parse(argv: list[str], prog: str = "ffnas search") -> tuple[SearchConfig, Path | None]:
    """Reads the command line; returns the checked configuration and the run directory to resume, if any.

    Raises:
        UserError: an option, a file or a value is wrong.
    """
    argv = normalise(argv)
    resume = value_of(argv, "--resume")
    if resume is not None:
        folder = Path(resume)
        if not (folder / "config.yaml").is_file():
            raise UserError(f"--resume: {resume!r} holds no config.yaml: give the folder of an earlier run")
        if any(a.startswith("--") and a.split("=")[0] not in ("--resume", "--config", "--ledger") for a in argv):
            raise UserError("--resume takes the run's own configuration: give no other option with it but --ledger")
        ledger = value_of(argv, "--ledger")  # the saved one is without its password
        argv = ["--config", str(_sound_config(folder)), *(("--ledger", ledger) if ledger else ())]
    else:
        folder = None
        preset = value_of(argv, "--preset") or SearchConfig.preset
        argv = ["--config", str(preset_path(preset)), *argv]
        argv = _with_space_files(argv)
    config = _read(argv, prog)
    config.space.file = None  # its values are in the other fields now
    validate(config)
    return config, folder


def parse_resolve(argv: list[str], prog: str = "ffnas search") -> tuple[Path, SearchConfig] | None:
    """The run directory and configuration of `--resolve RUN`, None where it is not given.

    The run's own configuration, with the constraints given in place of its own.

    Raises:
        UserError: the folder is no run, another option is given, or no constraint.
    """
    argv = normalise(argv)
    folder = value_of(argv, "--resolve")
    if folder is None:
        return None
    config_file = Path(folder) / "config.yaml"
    if not config_file.is_file():
        raise UserError(f"--resolve: {folder!r} holds no config.yaml: give the folder of a finished run")
    place = next(i for i, a in enumerate(argv) if a == "--resolve" or a.startswith("--resolve="))
    rest = argv[:place] + argv[place + (1 if "=" in argv[place] else 2) :]
    names = [a.partition("=")[0] for a in rest if a.startswith("--")]
    for name in names:
        if not name.startswith(("--budget.", "--objectives.")) or name == "--objectives.names":
            raise UserError(f"--resolve takes --budget.* and --objectives.* alone: leave {name} out")
    if not any(name.startswith("--budget.") for name in names):
        raise UserError("--resolve: give at least one constraint: --budget.params, flops, memory_mb or latency_ms")
    free = [f"--budget.{f.name}=null" for f in dataclasses.fields(BudgetConfig)]
    own = ["--objectives.names=[score]", "--objectives.latency_table=null"]
    config = _read(["--config", str(_sound_config(config_file.parent)), *free, *own, *rest], prog)
    config.sampler.name = "gaussian"
    validate(config)
    return Path(folder), config


def _read(argv: list[str], prog: str) -> SearchConfig:
    for given in values_of(argv, "--config"):
        _check_file(given)
    try:
        parser = build_parser(prog)
        values = vars(parser.instantiate(parser.parse_args(argv)))
    except (argparse.ArgumentError, ValueError, TypeError, OSError) as error:
        message = one_line(str(error))
        if message.startswith("budget.params:"):
            given = message.rpartition("Given value: ")[2]
            raise UserError(
                f"budget.params: {given}: give two numbers, lowest and highest (--budget.params 15e6 16e6); 0 and the"
                " highest for `at most`"
            ) from error
        raise UserError(message) from error
    return SearchConfig(**{f.name: values[f.name] for f in dataclasses.fields(SearchConfig)})


def _check_file(given: str) -> None:
    """Refuses a configuration file that no honest one looks like, before anything unfolds it.

    Raises:
        UserError: it is large, nested deeply, or has aliases, of which a few lines unfold to more than fits in memory.
    """
    path = Path(given)
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"--config {given}: larger than {MAX_CONFIG_BYTES} bytes: this is no configuration file")
        depth = 0
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"--config {given}: has an alias (*{event.anchor}): write the value out")
            if getattr(event, "tag", None):
                raise UserError(f"--config {given}: has a tag ({event.tag:.40}): write plain values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_CONFIG_DEPTH:
                raise UserError(
                    f"--config {given}: nested deeper than {MAX_CONFIG_DEPTH}: this is no configuration file"
                )
    except OSError as error:
        raise UserError(f"--config {given}: cannot be read ({error.strerror}): check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--config {given}: is not YAML: {one_line(str(error)):.300}") from error


def normalise(argv: list[str]) -> list[str]:
    """Dashes in option names become underscores, `--budget.params LOW HIGH` one bracketed value, `--objectives A,B` a
    list (with the sampler for it, unless one is named), and of two values of which one is enough the one that is given,
    here or in a configuration file, unsets the preset's other one (`search.config.pairs`)."""
    result: list[str] = []
    rest = list(argv)
    given = {_option_name(a) for a in argv if a.startswith("--")}
    while rest:
        argument = rest.pop(0)
        if argument.startswith("--"):
            name, equals, value = _option_name(argument), *argument.partition("=")[1:]
            word = None if equals else joined(name, rest)
            if word is not None:
                equals, value = "=", word
            argument = f"--{name}{equals}{value}"
            result += unset_by_option(name, given)
            file = value if equals else next(iter(rest), "")
            if name == "config" and Path(file).is_file():
                result += unset_by_values(_values_in(file))
            if name == "tensorboard":
                value = value if equals or not rest else rest.pop(0)
                result.append(f"--tracker={tracker_of(value)}")
                continue
            if name == "objectives":
                names = value if equals or not rest else rest.pop(0)
                result.append(f"--objectives.names=[{names.strip('[]')}]")
                if not any(re.match(r"--sampler[.](name|kind)(=|$)", a) for a in argv) and names.strip("[]") != "score":
                    result.append("--sampler.name=nsga2")
                continue
        result.append(argument)
        if argument == "--budget.params" and len(rest) > 1 and all(map(_is_number, rest[:2])):
            result.append(f"[{rest.pop(0)},{rest.pop(0)}]")
    return result


def _with_space_files(argv: list[str]) -> list[str]:
    """`--space.file` replaced by the fields it gives; the one in a configuration file stands before that file, so that
    what is written beside it counts."""
    result: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name not in ("--space.file", "--config"):
            result.append(argument)
            continue
        if not equals:
            if not rest:
                raise UserError(f"{name} needs a value")
            value = rest.pop(0)
        named = value if name == "--space.file" else _space_file_of(value)
        if named is not None:
            from search.space.file import read_space  # not above: it imports torch, and `--help` should answer at once

            result += [
                f"--space.{field}={given if isinstance(given, str) else json.dumps(given)}"
                for field, given in read_space(named).items()
            ]
        if name == "--config":
            result += ["--config", value]
    return result


def _space_file_of(config: str) -> str | None:
    """`space.file` of a configuration file; None where it has none. What else is wrong with the file shows later."""
    values = _values_in(config)
    space = values.get("space") if isinstance(values, dict) else None
    named = space.get("file") if isinstance(space, dict) else None
    if named is not None and not isinstance(named, str):
        raise UserError(f"space.file: must be a path, got {type(named).__name__}")
    return named


def _values_in(config: str) -> Any:
    """What a configuration file holds, None where it cannot be read: the parser's own message says what is wrong."""
    _check_file(config)
    try:
        return yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _option_name(argument: str) -> str:
    """`--a.b-c=value` to `a.b_c`."""
    return argument.partition("=")[0][2:].replace("-", "_")


def save_config(config: SearchConfig, path: Path) -> None:
    """Writes every value, resolved, as YAML that `--config` and `--resume` read back; twice, the second time hidden.
    A password in the ledger's URL is left out; files and folders are named from the root, so that the run goes on from
    wherever it is resumed."""
    text = yaml.safe_dump(saved_values(placed(config)), sort_keys=False, allow_unicode=True)
    write_text_atomic(_copy_of(path), text)
    write_text_atomic(path, text)


def saved_values(config: SearchConfig) -> dict[str, Any]:
    """A configuration as plain values, without a password in the ledger's URL."""
    values = dataclasses.asdict(config)
    if config.ledger is not None:
        values["ledger"] = without_password(config.ledger)
    return values


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


def placed(config: SearchConfig) -> SearchConfig:
    """The same configuration with its files and folders named from the root."""
    replace = dataclasses.replace
    data = {name: _absolute(getattr(config.data, name)) for name in ("train", "dev", "dir", "text")}
    return replace(
        config,
        teacher=_absolute(config.teacher),
        data=replace(config.data, **data),
        objectives=replace(config.objectives, latency_table=_absolute(config.objectives.latency_table)),
        targets=replace(config.targets, folder=_absolute(config.targets.folder)),
    )


def _absolute(source: Any) -> Any:
    """A file or folder named from the root, in lists too; what is none (a name on the hub, `package:NAME`) as it is."""
    if not isinstance(source, str):
        return [_absolute(part) for part in source] if isinstance(source, list) else source
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def _copy_of(config: Path) -> Path:
    return config.with_name(f".{config.name}.copy")


def _sound_config(folder: Path) -> Path:
    """The configuration of the run in `folder`; made again from its copy, said in one line, where it is cut short or no
    YAML mapping any more."""
    path, copy = folder / "config.yaml", _copy_of(folder / "config.yaml")
    cut_short = copy.exists() and path.stat().st_size < copy.stat().st_size and _starts_with(copy, path.read_bytes())
    if (_mapping(path) is None or cut_short) and _mapping(copy) is not None:
        print(f"ffnas: {path} is damaged: its copy from the start of the run is used", file=sys.stderr)
        copy_atomic(copy, path)
    if _mapping(copy) not in (None, _mapping(path)):
        print(f"ffnas: {path} was changed since the run began: the changed values count", file=sys.stderr)
    return path


def _starts_with(path: Path, content: bytes) -> bool:
    return path.read_bytes().startswith(content)


def _mapping(path: Path) -> dict[str, object] | None:
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def one_line(message: str) -> str:
    """A parser's message as one line without the parser's own words around it."""
    message = re.sub(r"\s+", " ", message).strip()
    return re.sub(r'^Parser key "([^"]+)": ', r"\1: ", message)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def values_of(argv: list[str], option: str) -> list[str]:
    """Every value given for `option`."""
    pairs = itertools.pairwise(argv)
    inline = [a.partition("=")[2] for a in argv if a.startswith(option + "=")]
    return [value for name, value in pairs if name == option] + inline


def value_of(argv: list[str], option: str) -> str | None:
    """The last value given for `option`, which is the one that counts."""
    value = None
    for index, argument in enumerate(argv):
        if argument == option:
            if index + 1 == len(argv):
                raise UserError(f"{option} needs a value")
            value = argv[index + 1]
        elif argument.startswith(option + "="):
            value = argument.partition("=")[2]
    return value
