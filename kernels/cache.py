"""Where ffnas keeps what it can make again: built extensions, tuned kernels, fine-tuned teachers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$FFNAS_CACHE`, or `$XDG_CACHE_HOME/ffnas`, or `~/.cache/ffnas`; not created here."""
    own = os.environ.get("FFNAS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "ffnas"
