"""Pairs of values of which one is enough: steps and epochs of a phase, max_steps and epochs of the fine-tuning, the
task by name and the file it is in.

A preset gives one of them. Who gives the other one, on the command line or in a configuration file, means it: the
preset's is unset then, whether it is the one that is asked first or not.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from search.config.schema import SearchConfig

_EXCLUSIVE = ("steps", "epochs")
_TOGETHER = (("max_steps", "epochs"), ("task", "train"))
"""Both may be given: of two numbers the smaller one counts, and a task says how a file of one's own is written."""


@dataclasses.dataclass(frozen=True)
class Partner:
    """The other value of a pair.

    Attributes:
        name: dotted, as on the command line.
        together: whether both may be given.
    """

    name: str
    together: bool


@lru_cache(maxsize=1)
def partners() -> dict[str, Partner]:
    """Per dotted name of a value in a pair the other one; found by the fields of the configuration."""
    return dict(_pairs_of(SearchConfig, ""))


def unset_by_option(name: str, given: set[str]) -> list[str]:
    """Arguments to put before the option `name`; `given` are the names of all options on the command line.

    Of two that exclude one another the last one counts.
    """
    partner = partners().get(name)
    if partner is None or (partner.together and partner.name in given):
        return []
    return [f"--{partner.name}=null"]


def unset_by_values(values: Any) -> list[str]:
    """Arguments to put before a configuration file with these values; one that gives both is left to itself."""
    return [
        f"--{partner.name}=null"
        for name, partner in partners().items()
        if _value(values, name) is not None and not _has(values, partner.name)
    ]


def _pairs_of(kind: type, prefix: str) -> Iterator[tuple[str, Partner]]:
    types = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for pair in (_EXCLUSIVE, *_TOGETHER):
        if names.issuperset(pair):
            for one, other in (pair, pair[::-1]):
                yield prefix + one, Partner(prefix + other, pair is not _EXCLUSIVE)
    for name in sorted(names):
        if dataclasses.is_dataclass(types[name]):
            yield from _pairs_of(types[name], f"{prefix}{name}.")


def _holder(values: Any, name: str) -> Mapping[str, Any]:
    """The mapping in which the last part of a dotted name would stand."""
    *path, _ = name.split(".")
    for part in path:
        values = values.get(part) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _has(values: Any, name: str) -> bool:
    return name.rpartition(".")[2] in _holder(values, name)


def _value(values: Any, name: str) -> Any:
    return _holder(values, name).get(name.rpartition(".")[2])
