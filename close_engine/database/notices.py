"""Notices from PostgreSQL: hear at once that a message was put into the outbox, through a connection of its own.

LISTEN belongs to a connection. Where PgBouncer in transaction mode gives that connection to others, LISTEN
succeeds and hears nothing: `Notices.are_heard` finds out. The environment variable CLOSE_ENGINE_LISTEN can name a URL
that goes to the server itself.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import peewee
import psycopg2.extensions
from playhouse.pool import MaxConnectionsExceeded, PooledDatabase

from close_engine.database.binding import current
from close_engine.database.url import database_from
from close_engine.errors import ConfigurationError, first_line

__all__ = ["LISTEN", "Listener", "Notices", "listening_database"]

#: The environment variable.
LISTEN = "CLOSE_ENGINE_LISTEN"

#: The channel, as in the migration that creates the outbox.
_CHANNEL = "close_engine_outbox"

#: Seconds without a notice, after which the connection is tried: it may be dead without a word.
_QUIET = 60.0

#: Why nobody is told, though the database has notices.
_UNHEARD = f"it does not hear its own notice, as through PgBouncer: name a URL of the server itself in {LISTEN}"

#: Turns the driver's errors into Peewee's.
_peewees_errors = peewee.__exception_wrapper__  # type: ignore[attr-defined]


def listening_database() -> peewee.PostgresqlDatabase | None:
    """Return the database to listen on: the bound one, or the one that the environment names.

    Returns:
        peewee.PostgresqlDatabase; None if the bound database has no notices.

    Raises:
        ConfigurationError: the environment names no PostgreSQL database.
    """
    bound, url = current().database, os.environ.get(LISTEN)
    if not isinstance(bound, peewee.PostgresqlDatabase):
        return None
    named = database_from(url) if url else bound
    if not isinstance(named, peewee.PostgresqlDatabase):
        raise ConfigurationError(f"{LISTEN} must name the PostgreSQL database that the worker uses.")
    return named


class Notices:
    """A connection that listens for the notice of every message that is put in and due.

    Args:
        database: peewee.PostgresqlDatabase, to connect as it does.

    Raises:
        peewee.PeeweeException: the database cannot be reached.
    """

    def __init__(self, database: peewee.PostgresqlDatabase) -> None:
        self._heard: list[str] = []
        # A connection that nobody else uses does not come from the pool.
        below: Any = super(PooledDatabase, database) if isinstance(database, PooledDatabase) else database
        with _peewees_errors:
            self._connection: Any = below._connect()
        self._interrupt, self._interrupted = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._interrupted, selectors.EVENT_READ)
        self._selector.register(self._connection, selectors.EVENT_READ)
        self._is_psycopg2 = isinstance(self._connection, psycopg2.extensions.connection)
        if not self._is_psycopg2:
            self._connection.add_notify_handler(lambda notice: self._heard.append(notice.payload))
        try:
            self._execute(f"LISTEN {_CHANNEL}")
        except BaseException:
            self.close()
            raise

    def are_heard(self, within: float = 2.0) -> bool:
        """Send a notice through the bound database, and return whether it is heard here.

        Args:
            within: float, how many seconds to wait for it.

        Raises:
            peewee.PeeweeException: the database cannot be reached.
        """
        token, end = secrets.token_hex(8), time.monotonic() + within
        current().execute("SELECT pg_catalog.pg_notify(%s::text, %s::text)", (_CHANNEL, token))
        while token not in self._heard and (left := end - time.monotonic()) > 0:
            self._read(left)
        found = token in self._heard
        self._heard.clear()
        return found

    def wait(self) -> bool:
        """Wait for a notice, or until `interrupt` is called; return whether there was a notice.

        Raises:
            peewee.PeeweeException: the connection is lost.
        """
        if not self._heard and not self._read(_QUIET):
            self._execute("SELECT 1")
        heard = bool(self._heard)
        self._heard.clear()
        return heard

    def interrupt(self) -> None:
        """End `wait` early, from any thread."""
        with suppress(OSError):  # it is closed already
            self._interrupt.send(b"\0")

    def close(self) -> None:
        """Close the connection."""
        self._selector.close()
        self._interrupt.close()
        self._interrupted.close()
        with suppress(Exception):  # it may be broken
            self._connection.close()

    def _execute(self, statement: str) -> None:
        with _peewees_errors:
            self._connection.cursor().execute(statement)
            self._take()

    def _read(self, seconds: float) -> bool:
        """Wait until there is something to read, and read it; return whether there was anything."""
        ready = self._selector.select(seconds)
        if any(key.fileobj is self._connection for key, _ in ready):
            with _peewees_errors:
                self._take()
        return bool(ready)

    def _take(self) -> None:
        if self._is_psycopg2:
            self._connection.poll()
            self._heard += [notice.payload for notice in self._connection.notifies]
            self._connection.notifies.clear()
            return
        self._connection.pgconn.consume_input()
        while notice := self._connection.pgconn.notifies():
            self._heard.append(notice.extra.decode())


class Listener:
    """Listens until it is stopped, on a new connection if one is lost.

    Args:
        heard: is called when something was put in, and when listening begins: something may have come before.
        changed: is called with None when it listens, and with a sentence that says why it does not.
        pause: float, how many seconds to wait for a database that is away.

    Raises:
        ConfigurationError: the environment names no PostgreSQL database.
    """

    def __init__(self, heard: Callable[[], None], changed: Callable[[str | None], None], pause: float) -> None:
        self._heard = heard
        self._changed = changed
        self._pause = pause
        self._database = listening_database()
        self._over = threading.Event()
        self._notices: Notices | None = None

    def run(self) -> None:
        """Listen until `stop` is called, or if it turns out that nothing can be heard."""
        if self._database is None:
            self._changed("this database tells nobody of a new message")
            return
        was_heard = False
        while not self._over.is_set():
            is_new = True
            try:
                with closing(Notices(self._database)) as notices:
                    self._notices = notices
                    with current().database.connection_context():  # only for this: others may need it
                        are_heard = notices.are_heard()
                    if not are_heard and not was_heard:
                        self._changed(_UNHEARD)
                        return
                    was_heard = True
                    self._changed(None)
                    self._heard()
                    is_new = False
                    while not self._over.is_set():
                        if notices.wait():
                            self._heard()
            except (peewee.PeeweeException, MaxConnectionsExceeded) as error:
                self._changed(first_line(error))
                if is_new:
                    self._over.wait(self._pause)

    def stop(self) -> None:
        """End `run`, from any thread."""
        self._over.set()
        if self._notices is not None:
            self._notices.interrupt()
