"""The temporary database that the demo runs in, created next to the database that a URL names."""

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
    """Create a temporary database for the length of a block, next to the one that a URL names.

    Args:
        url: str, the URL of an existing database, which is not touched. For SQLite, the temporary file is created in
            the same directory; for PostgreSQL, a temporary database is created on the same server. The default is a
            SQLite file in the system's temporary directory.

    Yields:
        str, the URL of the temporary database.

    Raises:
        ConfigurationError: the database cannot be created there.
    """
    if url is None or url.startswith("sqlite"):
        file = urlsplit(url or "").path[1:]
        parent = None if file in ("", ":memory:") else Path(file).parent
        try:
            directory = tempfile.TemporaryDirectory(prefix="close_engine_demo_", dir=parent)
        except OSError as error:
            raise ConfigurationError(
                f"The demo cannot create a temporary database in {parent or tempfile.gettempdir()}: {error.strerror}."
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
                f"The demo cannot create a temporary database next to {without_password(url)}: "
                f"{one_line(error)}. Use a role with CREATEDB, or omit --database to use SQLite."
            ) from error
        parts = urlsplit(url)
        yield f"{parts.scheme}://{parts.netloc}/{name}?{parts.query}"
    finally:
        if not server.is_closed():
            server.execute_sql(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
            server.close()
