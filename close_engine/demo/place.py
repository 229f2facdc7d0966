"""Where the demonstration is played: a temporary database, beside the one that a URL names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import peewee

from close_engine.database.fields import create_id
from close_engine.database.url import connect, without_password
from close_engine.errors import ConfigurationError, one_line

__all__ = ["temporary_database"]


@contextmanager
def temporary_database(url: str | None = None) -> Iterator[str]:
    """A database for the length of a block, beside the one that a URL names, which is not touched.

    Args:
        url: of a SQLite file, in whose directory a temporary one is made; or of a PostgreSQL database, on whose server
            one is created and dropped. The default is a SQLite file in the system's directory for temporary files.

    Yields:
        its URL.

    Raises:
        ConfigurationError: it cannot be made there.
    """
    if url is None or url.startswith("sqlite"):
        file = urlsplit(url or "").path[1:]
        place = None if file in ("", ":memory:") else Path(file).parent
        try:
            directory = tempfile.TemporaryDirectory(prefix="close_engine_demo_", dir=place)
        except OSError as error:
            raise ConfigurationError(
                f"The demo cannot make a temporary database in {place or tempfile.gettempdir()}: {error.strerror}."
            ) from error
        with directory as name:
            yield f"sqlite:///{name}/demo.db"
        return
    server, name = connect(url), f"close_engine_demo_{create_id()}"
    try:
        try:
            server.execute_sql(f"CREATE DATABASE {name} TEMPLATE template0")
            server.execute_sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        except peewee.DatabaseError as error:
            raise ConfigurationError(
                f"The demo cannot make a temporary database beside {without_password(url)}: "
                f"{one_line(error)}. Use a role with CREATEDB, or leave --database out for SQLite."
            ) from error
        parts = urlsplit(url)
        yield f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"
    finally:
        if not server.is_closed():
            server.execute_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            server.close()
