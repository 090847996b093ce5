"""Where ffnas keeps what it can make again: built extensions, tuned kernels, fine-tuned teachers."""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from pathlib import Path


def cache_dir() -> Path:
    """`$FFNAS_CACHE`, or `$XDG_CACHE_HOME/ffnas`, or `~/.cache/ffnas`; not created here.

    Without a home directory (a container's user number, say) `~` is `temporary_home()`.
    """
    own = os.environ.get("FFNAS_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base).expanduser() / "ffnas"
    home = os.path.expanduser("~")  # not Path.home(), which raises where there is neither HOME nor an entry
    return (Path(home) if os.path.isdir(home) else temporary_home()) / ".cache" / "ffnas"


@lru_cache(maxsize=1)
def temporary_home() -> Path:
    """A folder of this user's own in the temporary one, the same in every process; created.

    Libraries are loaded from it, so a folder there that is another user's is not taken: this process gets a new one.
    """
    place = Path(tempfile.gettempdir()) / f"ffnas-home-{os.getuid()}"
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        own = place.stat().st_uid == os.getuid() and not place.is_symlink()
    except OSError:
        own = False
    return place if own else Path(tempfile.mkdtemp(prefix="ffnas-home-"))
