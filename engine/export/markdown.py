"""Markdown of model cards: texts from anywhere stay texts, and tables stay tables."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*_\[\]|~$]|^[#+=-]")
_NUMBERED = re.compile(r"^(\d+)([.)])(?=\s)")
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of what follows, past the text they stand in."""


def plain(text: Any) -> str:
    """`text` in one line, with everything escaped that Markdown, HTML or a table cell would take for more than text."""
    one_line = " ".join(_TURNING.sub("", str(text)).split())
    visible = "".join(" " if unicodedata.category(c) == "Cc" else c for c in one_line)
    escaped = _NUMBERED.sub(r"\1\\\2", _SPECIAL.sub(r"\\\g<0>", visible))
    return "".join(_HTML.get(c, c) for c in escaped)


def code(text: str) -> str:
    """A block of code with one line."""
    one_line = " ".join(text.split())
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", one_line)), default=0))
    return f"{fence}\n{one_line}\n{fence}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; cells are taken as they are, so texts go through `plain` first."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
