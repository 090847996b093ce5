"""Values that are words whatever they look like: names of columns and classes.

YAML reads `[no, yes]` as booleans, `[0, 1]` as numbers; and an option's value that begins with a minus sign, such as
`-1,0,1`, looks like another option. Here they are kept as written, on the command line and in configuration files.

Rejected: wider types of the fields. What YAML has made of `no` or `1.0` cannot be turned back.
"""

from __future__ import annotations

from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

WORDS = ("text_columns", "label_column", "label_names", "tasks", "delimiter")
"""Fields of `DataConfig` that hold words."""

MODE = "ffnas"
"""Name of the loader, for a parser's `parser_mode`."""


_TENSORBOARD = {"true": "tensorboard", "false": "none"}


def tracker_of(tensorboard: object) -> str:
    """`tracker` for a value of `tensorboard`, its name while there was no other; runs that were begun then go on."""
    return _TENSORBOARD.get(str(tensorboard).lower(), str(tensorboard))


def install() -> None:
    """Makes `MODE` known to jsonargparse; more calls change nothing."""
    usual = get_loader("yaml")

    def load(text: str) -> Any:
        value = usual(text)
        if isinstance(value, dict) and "tensorboard" in value:
            value.setdefault("tracker", tracker_of(value.pop("tensorboard")))
        data = value.get("data") if isinstance(value, dict) else None
        if isinstance(data, dict) and any(name in data for name in WORDS):
            written = yaml.load(text, Loader=yaml.BaseLoader)["data"]  # every scalar as text
            for name in WORDS:
                if data.get(name) is not None:
                    data[name] = written[name]
        return value

    set_loader(MODE, load, (yaml.YAMLError,))


def joined(name: str, rest: list[str]) -> str | None:
    """The value of an option of words that would be taken for another option, None where there is none.

    Args:
        name: of the option, as `data.label_names`.
        rest: the arguments behind it; the value is taken out of them.
    """
    prefix, _, field = name.rpartition(".")
    if prefix != "data" or field not in WORDS or not rest:
        return None
    return rest.pop(0) if rest[0].startswith("-") and not rest[0].startswith("--") else None
