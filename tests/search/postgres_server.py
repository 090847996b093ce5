"""A PostgreSQL server of the tests' own: in a temporary folder, at a free port, gone when the test ends."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "s3cret-word"


def _program(name: str) -> str | None:
    places = sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)  # Debian keeps them off the path
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def _account() -> str | None:
    """Who runs the server, which refuses to be the superuser's."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    pytest.skip("PostgreSQL does not run as the superuser, and there is no other account")


class Server:
    """A server whose only account is `ffnas`, with a password.

    Args:
        folder: its data, owned by who runs it.
        account: who runs it; None: this user.
    """

    def __init__(self, folder: Path, account: str | None) -> None:
        self.folder, self.account = folder, account
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        options = ["--auth=scram-sha-256", "--username=ffnas", f"--pwfile={folder / 'password'}", "--no-sync"]
        self._run("initdb", "-D", str(folder / "data"), *options)

    def url(self, database: str = "postgres", password: str = PASSWORD) -> str:
        return f"postgresql://ffnas:{password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self.folder} -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", log, "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")

    def create(self, database: str) -> str:
        """URL of a new database."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        result = subprocess.run(
            [program, *arguments],
            user=self.account,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # a pipe would stay open in the server
            stderr=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        assert result.returncode == 0, (name, result.returncode)


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A running server; skips the test where PostgreSQL or its driver is not installed."""
    for name in ("initdb", "pg_ctl", "postgres"):
        if _program(name) is None:
            pytest.skip(f"no PostgreSQL server installed ({name} not found)")
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed: pip install 'ffnas[postgres]'")
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="ffnas-pg-"))
    try:
        if account is not None:
            shutil.chown(folder, account)
        server = Server(folder, account)
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop()
    finally:
        time.sleep(0.1)
        shutil.rmtree(folder, ignore_errors=True)
