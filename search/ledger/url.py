"""URLs of ledgers: which driver they need, how they may be shown, how connections are made.

PostgreSQL is spoken through psycopg 3, whatever SQLAlchemy's own default is at the moment; a driver named in the URL
wins. Sessions run in UTC, because Optuna compares times of signs of life that different clients wrote.

Passwords belong into `~/.pgpass` or `PGPASSWORD`, which the PostgreSQL library reads by itself; one in a URL is used,
but never shown and never written to a file.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qsl, urlencode

from engine.errors import UserError

CONNECT_TIMEOUT = 10
"""Seconds to wait for a server that does not answer."""

KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000}
"""Seconds (the last: milliseconds) after which a connection to a machine that vanished counts as lost."""


def check(url: str) -> None:
    """Raises `UserError` unless `url` looks like a database URL."""
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme or not rest.strip("/"):
        raise UserError(
            f"ledger: {without_password(url)!r} is not a database URL: give postgresql://USER@HOST/DATABASE or"
            " sqlite:////PATH; without --ledger the run directory has one of its own"
        )


def without_password(url: str) -> str:
    """The URL as it may be shown and kept."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    rest, question, query = rest.partition("?")
    account, at, host = rest.rpartition("@")
    if not separator and at:
        account = "..."
    shown = f"{scheme}{separator}{account.partition(':')[0]}{at}{host}"
    kept = [(k, v) for k, v in parse_qsl(query, keep_blank_values=True) if "password" not in k.lower()]
    return f"{shown}{question}{urlencode(kept, safe='/:')}" if question and kept else shown


def with_driver(url: str) -> str:
    """The URL for SQLAlchemy: `postgresql://` and `postgres://` name psycopg 3 as the driver."""
    scheme, separator, rest = url.partition("://")
    return f"postgresql+psycopg{separator}{rest}" if scheme in ("postgresql", "postgres") else url


def connection_options(url: str, timeout: float) -> dict[str, Any]:
    """Options of SQLAlchemy's engine; `timeout` is how long to wait for a locked SQLite file, in seconds."""
    if url.startswith("sqlite"):
        return {"connect_args": {"timeout": timeout}}
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("postgresql"):
        options["connect_args"] = {"connect_timeout": CONNECT_TIMEOUT, "options": "-c timezone=UTC", **KEEPALIVE}
    return options


def missing_driver(url: str, error: ImportError) -> str:
    """What is not installed, and what to install."""
    cause = error.__cause__ or error
    remedy = "pip install 'ffnas[postgres]'" if url.startswith("postgres") else "install it"
    return f"its database driver is not installed ({cause}): {remedy}"
