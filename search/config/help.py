"""`ffnas search --help`: what people set, on one screen, with the defaults of the preset they name; `--help-all`.

Defaults are read as a search reads them (`search.config.options`), `--config` files included, so that help and run
cannot differ. Rejected: the parser's own help alone. It has a thousand lines, and its defaults are those of no preset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from search.config.options import build_parser, flat, parse, preset_names, value_of, values_of
from search.config.schema import SearchConfig


class Shown(NamedTuple):
    """One option of the short help.

    Attributes:
        name: dotted, as in the configuration; without a place there it has no default.
        value: what stands for its value.
        meaning: in a few words.
        unset: the default in words where the configuration holds null.
    """

    name: str
    value: str
    meaning: str
    unset: str = ""


DATA = (
    Shown("data.train", "FILE", "CSV, TSV, JSON Lines, Parquet or hub name", "the embedded demo"),
    Shown("data.dev", "FILE", "what the final score is reported on", "held out of train"),
    Shown("data.task", "NAME", "published task instead: glue/mnli, squad_v2, race, ..."),
    Shown("data.text_columns", "A[,B]", "text columns", "found by name"),
    Shown("data.label_column", "NAME", "label column", "found by name"),
    Shown("data.max_length", "N", "longest text in tokens; longer ones are cut"),
)
TEACHER = (Shown("teacher", "NAME", "hub name, folder or package:NAME"),)
RUN = (
    Shown("seed", "N", "same seed, same machine: same result"),
    Shown("device", "NAME", "auto, cpu or cuda[:N]"),
    Shown("threads", "N", "CPU threads", "PyTorch's choice"),
)
SEARCH = {
    "your data": DATA,
    "what to make": (
        *TEACHER,
        Shown("budget.encoder", "SHARE", "most parameters of its layers, as a share of the teacher's", "1/4"),
        Shown("budget.total", "SHARE", "most parameters in all, as a share of the teacher's"),
        Shown("budget.speedup", "X", "times as fast as the teacher"),
        Shown("budget.latency_ms", "MS", "most milliseconds of one pass here"),
        Shown("budget.keep", "SHARE", "the smallest that holds this share of the teacher's score"),
    ),
    "how": (
        Shown("preset", "NAME", f"sizes and lengths: {', '.join(preset_names())}"),
        Shown("strategy", "NAME", "inherit (the teacher's own parts), paper, or auto"),
        Shown("finetune.epochs", "N", "passes of the teacher's fine-tuning", "by the data"),
        Shown("inherit.steps", "N", "steps of the full distillation", "three passes, 300 to 900"),
        Shown("inherit.batch_size", "N", "texts per step"),
        Shown("inherit.lr", "LR", "peak learning rate of the students"),
    ),
    "the run": (
        Shown("runs", "FOLDER", "where run directories go"),
        Shown("name", "NAME", "of the run directory", "preset, date, time"),
        *RUN,
        Shown("tracker", "NAMES", "tensorboard, wandb, mlflow or none"),
        Shown("config", "FILE", "any option, in YAML"),
        Shown("resume", "RUN", "go on after an interruption"),
    ),
}
"""Options of `ffnas search --help`, by group."""

TEACHING = {
    "your data": DATA,
    "the teacher": (
        *TEACHER,
        Shown("preset", "NAME", f"what the rest starts from: {', '.join(preset_names())}"),
        Shown("finetune.epochs", "N", "passes over the data", "by the data"),
        Shown("finetune.max_steps", "N", "most optimizer steps", "by the data"),
        Shown("finetune.batch_size", "N", "texts per step"),
        Shown("finetune.lr", "LR", "peak learning rate", "by the teacher's width"),
        *RUN,
    ),
}
"""Those of `ffnas teacher --help`."""

HELP, ALL = frozenset({"-h", "--help"}), "--help-all"

SEARCH_HEAD = """usage: ffnas search [options]      defaults as preset {preset} has them

Makes a small, fast encoder for your task out of a teacher, and a report that says what it is worth.
  ffnas search                                       the embedded demo, teacher and texts included
  ffnas search --data.train a.csv --data.dev b.csv --teacher bert-base-uncased
  ffnas search --preset hour --budget.speedup 4      longer, and four times as fast as the teacher
  ffnas search --resume runs/NAME"""

TEACHER_HEAD = """usage: ffnas teacher [options]      defaults as preset {preset} has them

Fine-tunes a teacher on a task as a search would first, or finds it in the cache, and says where.
  ffnas teacher --data.train a.csv --teacher bert-base-uncased"""


def asked_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help of either length."""
    return ALL in argv or not HELP.isdisjoint(argv)


def search_help(argv: Sequence[str]) -> str:
    """The help of `ffnas search` that `argv` asks for.

    Raises:
        UserError: an unknown preset, or a wrong configuration file.
    """
    return _help(argv, SEARCH_HEAD, SEARCH, "ffnas search")


def teacher_help(argv: Sequence[str]) -> str:
    """That of `ffnas teacher`; see `search_help`."""
    return _help(argv, TEACHER_HEAD, TEACHING, "ffnas teacher")


def _help(argv: Sequence[str], head: str, groups: dict[str, tuple[Shown, ...]], prog: str) -> str:
    config = _defaults(list(argv))
    if ALL in argv:
        return _everything(config, prog)
    lines = [head.format(preset=config.preset)]
    width = max(len(f"{o.name} {o.value}") for group in groups.values() for o in group)
    for title, options in groups.items():
        lines.append(f"{title}:")
        for option in options:
            told = f"--{option.name} {option.value}"
            default = _default(config, option)
            lines.append(f"  {told:<{width + 2}}  {option.meaning}{f' ({default})' if default else ''}")
    lines.append(f"All options, with the same preset's defaults: {prog} --preset {config.preset} {ALL}")
    return "\n".join(lines)


def _defaults(argv: list[str]) -> SearchConfig:
    """What a search with the preset and the configuration files of `argv` has."""
    argv = [word for word in argv if word not in HELP and word != ALL]
    preset = value_of(argv, "--preset")
    files = [word for file in values_of(argv, "--config") for word in ("--config", file)]
    return parse([*(("--preset", preset) if preset else ()), *files])[0]


def _everything(config: SearchConfig, prog: str) -> str:
    """The parser's own help."""
    parser = build_parser(prog)
    parser.usage = f"{prog} [options]      defaults as preset {config.preset} has them"
    parser.set_defaults(flat(dataclasses.asdict(config)))
    return str(parser.format_help()).rstrip()


def _default(config: SearchConfig, option: Shown) -> str:
    value: Any = config
    for part in option.name.split("."):
        value = getattr(value, part, None)
    return option.unset if value is None else str(value)
