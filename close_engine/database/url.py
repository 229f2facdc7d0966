"""From a URL to a Peewee database that every model is bound to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from urllib.parse import unquote

import peewee
import psycopg2
from playhouse import db_url
from playhouse.pool import PooledDatabase
from psycopg2.extensions import parse_dsn

from close_engine.carriers import Keyword
from close_engine.database.binding import bind, utc_now
from close_engine.database.sqlite import WalConnection
from close_engine.errors import ConfigurationError

__all__ = ["DEFAULT_URL", "connect", "database_from", "without_password"]

DEFAULT_URL = "sqlite:///close_engine.db"

#: Query parameters that Prisma puts into its URLs and that libpq refuses.
_PRISMA_ONLY = {
    "connection_limit",
    "pgbouncer",
    "pool_timeout",
    "socket_timeout",
    "sslaccept",
    "statement_cache_size",
}

_ENCODE = "percent-encode the special characters in its user and password"

_POOL_OPTIONS = ("max_connections", "stale_timeout", "timeout")

#: How many seconds to wait for a connection of the pool, unless the URL says how long: Peewee does not wait at all.
_POOL_TIMEOUT = 10


def connect(
    url: str | None = None,
    *,
    leads: str | None = None,
    users: str | None = None,
    clients: str | None = None,
    clock: Callable[[], datetime] = utc_now,
    region: str | None = None,
    words: Mapping[str, Keyword] | None = None,
) -> peewee.Database:
    """Make a Peewee database from a URL and bind every model to it. It opens connections as they are needed.

    Args:
        url: `postgresql://user:password@host/name`, as in Prisma's DATABASE_URL, or `sqlite:///file.db`; the default
            is the environment variable CLOSE_ENGINE_DATABASE, or else `sqlite:///close_engine.db`.
            `postgresql+pool://…` keeps a pool of connections. Its parameters are `max_connections`, `stale_timeout` and
            `timeout`: how many seconds to wait for a connection, 10 by default, 0 for as long as it takes.
        leads, users, clients, clock, region, words: as for `bind`.

    Returns:
        the database.

    Raises:
        ConfigurationError: the URL cannot be used, or one of the others. No error shows the URL's password.
    """
    url = url or os.environ.get("CLOSE_ENGINE_DATABASE") or DEFAULT_URL
    database = database_from(url)
    return bind(database, leads=leads, users=users, clients=clients, clock=clock, region=region, words=words)


def without_password(url: str) -> str:
    """Return the URL without its password, even if the URL is malformed."""
    url = re.sub(r"(password\w*\s*=\s*)('[^']*'|[^&\s]*)", r"\1***", url, flags=re.IGNORECASE)
    head, at, tail = url.rpartition("@")
    if at:
        return re.sub(r"(^(?:[^:]*://)?[^:]*:)(?!//).*", r"\1***", head, flags=re.DOTALL) + at + tail
    # In user:password without @host, the password is where a port would be.
    return re.sub(r"(://[^/?#:]+:)(?![0-9]+(?:[/?,]|$))[^/?#]+", r"\1***", url)


_URL = re.compile(
    r"(?P<scheme>(?P<kind>sqlite|postgres(?:ql)?)(?:\+pool)?)://(?P<place>(?:[^/@]*@)?[^?]+)(?:\?(?P<query>.*))?",
    re.DOTALL,
)


def database_from(url: str) -> peewee.Database:
    """Make a Peewee database from a URL, without binding anything to it. Raises what `connect` raises."""
    try:
        match = _URL.fullmatch(url)
        if match is None:
            raise ValueError("write postgresql://user:password@host/name or sqlite:///file.db")
        query = dict(pair.partition("=")[::2] for pair in (match["query"] or "").split("&") if pair)
        database = db_url.schemes[match["scheme"]]
        options: dict[str, Any] = {}
        if issubclass(database, PooledDatabase):
            given = {name: _number(name, query.pop(name)) for name in _POOL_OPTIONS if name in query}
            options = {"timeout": _POOL_TIMEOUT, **given}
            if match["kind"] == "sqlite":
                # The pool passes a connection on from thread to thread, and gives it to one at a time.
                options["check_same_thread"] = False
        read = _sqlite_options if match["kind"] == "sqlite" else _postgres_options
        made: peewee.Database = database(**options, **read(match["place"], query))
    except ValueError as error:
        raise ConfigurationError(f"The database URL {without_password(url)!r} cannot be used: {error}.") from None
    return made


def _number(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{name} must be a number")
    return int(value)


def _sqlite_options(place: str, query: Mapping[str, str]) -> dict[str, Any]:
    if query:
        raise ValueError(f"a SQLite URL takes no parameters; remove {', '.join(query)}")
    if not place.startswith("/"):
        raise ValueError(f"write three slashes before a file, sqlite:///{place}")
    if re.search("[\x00\ud800-\udc7f\udd00-\udfff]", place):  # the other surrogates stand for bytes that are not UTF-8
        raise ValueError("no file has such a name")
    return {
        "database": place[1:] or ":memory:",
        "factory": WalConnection,
        "pragmas": [("foreign_keys", 1)],
    }


def _schema(encoded: str) -> str:
    try:
        schema = unquote(encoded, errors="strict")
        schema.encode()
    except UnicodeError:
        raise ValueError("its schema is not UTF-8") from None
    if not schema or "\x00" in schema:
        raise ValueError("its schema is empty" if not schema else "its schema has a NUL character")
    if "$body$" in schema:
        raise ValueError("its schema has $body$ in its name, which ends the text of a function")
    if schema == "close_engine":
        raise ValueError("the schema close_engine is for this library's own tables; name the one of the CRM's")
    return schema


def _postgres_options(place: str, query: dict[str, str]) -> dict[str, Any]:
    """Return psycopg2's arguments; libpq itself parses the URL."""
    schema = _schema(query.pop("schema", "public"))
    known = "&".join(f"{name}={value}" for name, value in query.items() if name not in _PRISMA_ONLY)
    try:
        options: dict[str, Any] = parse_dsn(f"postgresql://{place}?{known}")
    except psycopg2.ProgrammingError as error:
        # Every other message of libpq may quote the password.
        unknown = re.search(r'URI query parameter: ("[^"]*")', str(error))
        raise ValueError(f"there is no parameter {unknown[1]}" if unknown else _ENCODE) from None
    if "@" in options.get("host", "") or "@" in place.partition("/")[2]:
        raise ValueError(_ENCODE)
    if not re.fullmatch("[0-9,]*", options.get("port", "")):
        raise ValueError("its port is not a number; write @ and the host after the password")
    if "dbname" not in options:
        raise ValueError("it does not name a database")
    options["database"] = options.pop("dbname")
    if schema != "public":
        quoted = '"' + schema.replace('"', '""') + '"'
        search_path = "-c search_path=" + re.sub(r"([\\\s])", r"\\\1", quoted)
        options["options"] = f"{options.get('options', '')} {search_path}"
    return options
