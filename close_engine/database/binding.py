"""What the models are bound to: the one piece of global state.

All other code asks `current()` for the binding, and the binding's `dialect` for what differs between databases:

>>> import peewee
>>> database = bind(peewee.SqliteDatabase(":memory:"))
>>> current().dialect.own_table("history")
(None, 'close_engine_history')
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import peewee
from playhouse.pool import MaxConnectionsExceeded, PooledDatabase

from close_engine.carriers import Keyword, lexicon, require_region
from close_engine.database.dialect import Dialect, identifier
from close_engine.database.fields import UtcDateTimeField, clean_text, milliseconds
from close_engine.database.postgresql import POSTGRES
from close_engine.database.provenance import Provenance, Write
from close_engine.database.sqlite import SQLITE
from close_engine.database.tasks import note_openers, require_own_transaction
from close_engine.errors import (
    ConfigurationError,
    GuardMissing,
    InvalidValue,
    StageConflict,
    sqlstate,
    unhidden,
)

__all__ = [
    "Binding",
    "Tables",
    "bind",
    "current",
    "database_proxy",
    "is_transient",
    "moment",
    "now",
    "require_bound",
    "utc_now",
]

_SQLITE_NEEDED = (3, 35, 0)

#: The library's own tables beside those of the CRM.
_OURS = ("close_engine_conversations", "pending_actions")


@dataclass(frozen=True)
class Tables:
    """The names of the CRM's three tables, which differ between deployments.

    Attributes:
        leads: name of the table of leads.
        users: name of the table of users.
        clients: name of the table of clients.
    """

    leads: str
    users: str
    clients: str

    @classmethod
    def named(cls, leads: str | None = None, users: str | None = None, clients: str | None = None) -> Tables:
        """Take the names that are given, or else those of the environment, or else `leads`, `users` and `clients`.

        The environment variables are `CLOSE_ENGINE_LEADS_TABLE`, `CLOSE_ENGINE_USERS_TABLE` and
        `CLOSE_ENGINE_CLIENTS_TABLE`. The last defaults are what Prisma's `@@map` calls the tables.
        """
        given = {"leads": leads, "users": users, "clients": clients}
        return cls(
            **{
                table: (os.environ.get(f"CLOSE_ENGINE_{table.upper()}_TABLE") or table) if name is None else name
                for table, name in given.items()
            }
        )


@dataclass(frozen=True)
class Binding:
    """The one piece of global state: what the models are bound to.

    Attributes:
        region: where phone numbers without a country code are from; None if that is not known.
        words: the words by which people opt out and in, by their spelling.
    """

    database: peewee.Database
    tables: Tables
    clock: Callable[[], datetime]
    dialect: Dialect
    region: str | None = None
    words: Mapping[str, Keyword] = field(default_factory=lexicon)

    def sql(self, text: str) -> str:
        """Translate a statement as `Dialect.sql` does, and `{leads}` to the CRM's name of its table of leads."""
        return _translated(self.dialect, self.tables.leads, text)

    def execute(self, text: str, parameters: Sequence[Any] = ()) -> Any:
        """Run a statement that is written as `sql` takes it, and return its cursor."""
        statement = self.sql(text)
        if not statement.lstrip().startswith("SELECT"):
            require_own_transaction(self.database)
        return self.dialect.run(self.database, lambda: self.database.execute_sql(statement, parameters))

    def for_update(self, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        """Inside a transaction, make a query lock the rows that it finds against every other writer."""
        return self.dialect.for_update(self.database, query)

    def attributed(self, provenance: Provenance, write: Write) -> AbstractContextManager[None]:
        """Inside a transaction, give the history this provenance for the write that the block makes.

        Raises:
            GuardMissing: the triggers that record it are not there, or do not fire.
        """
        return self.dialect.attributed(self.database, provenance, write)

    def count(self, query: peewee.ModelSelect[Any]) -> int:
        """How many rows a query without an order finds: Peewee's own `count()` calls the function unqualified."""
        return int(query.select(self.dialect.function("count", peewee.SQL("*"))).scalar() or 0)


@lru_cache(maxsize=256)
def _translated(dialect: Dialect, leads: str, text: str) -> str:
    # The name goes in last, because it may hold anything, also braces.
    return dialect.escaped(identifier(leads)).join(map(dialect.sql, text.split("{leads}")))


#: Every database that was ever bound and is still there.
_bound: weakref.WeakSet[peewee.Database] = weakref.WeakSet()

#: Connections of the parent process. A child must neither use them nor close them: the parent still does.
_inherited: list[Any] = []


def _forget_connections() -> None:
    """In a forked process, let every database that was bound open connections of its own."""
    for database in _bound:
        state = database._state  # type: ignore[attr-defined]
        _inherited.append(state.conn)
        state.reset()
        # A thread that is not there any more may hold them, for example one that was just connecting.
        database._lock = threading.Lock()  # type: ignore[attr-defined]
        if isinstance(database, PooledDatabase):
            _inherited.append((database._connections, database._in_use))
            database._connections, database._in_use = [], {}
            database._pool_lock = threading.RLock()
            database._pool_available = threading.Condition(database._pool_lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)


class _NotBound(ConfigurationError, AttributeError):
    """Also an AttributeError, so that `hasattr()` works on the proxy."""


class _DatabaseProxy(peewee.DatabaseProxy):
    def execute(self, query: Any, **options: Any) -> Any:
        """Run a query of the models."""
        binding = current()
        if isinstance(query, (peewee.Insert, peewee.Update, peewee.Delete)):
            require_own_transaction(binding.database)
        return binding.dialect.run(binding.database, lambda: binding.database.execute(query, **options))

    def __getattr__(self, name: str) -> Any:
        return getattr(current().database, name)


#: The Peewee proxy that the models are defined with; `bind` initializes it.
database_proxy = _DatabaseProxy()

_binding: Binding | None = None


def utc_now() -> datetime:
    """Return the current moment: the clock that is used unless `bind` is given another."""
    return datetime.now(timezone.utc)


def current() -> Binding:
    """Return the binding that `bind` or `connect` made.

    Raises:
        ConfigurationError: no database is bound yet.
    """
    if _binding is None:
        raise _NotBound("No database is bound: call close_engine.connect(url) or close_engine.bind(database) first.")
    return _binding


def now() -> datetime:
    """Return the current moment by the binding's clock: timezone-aware UTC with milliseconds.

    Raises:
        ConfigurationError: the clock returned a moment without a timezone.
    """
    moment = current().clock()
    if moment.utcoffset() is None:
        raise ConfigurationError(
            f"The clock returned {moment}, which has no timezone: bind a clock that returns datetime.now(timezone.utc)."
        )
    return milliseconds(moment)


#: Reads a time as both databases return it.
_A_TIME = UtcDateTimeField[datetime]()


def moment() -> datetime:
    """Return the current moment by the database's clock: timezone-aware UTC with milliseconds.

    Raises:
        GuardMissing: the library's own tables or functions are gone.
    """
    try:
        (found,) = current().execute("SELECT {moment}").fetchone()
    except (peewee.ProgrammingError, peewee.OperationalError) as error:
        # PostgreSQL has no such schema or function, SQLite no such table.
        if sqlstate(error) in ("3F000", "42883") or "no such table" in str(error):
            raise GuardMissing("close_engine_conversations") from error
        raise
    at: datetime = _A_TIME.python_value(found)
    return at


#: The classes of SQLSTATEs that pass: no connection, a transaction to repeat, no resources, the server is going away.
_PASSING = ("08", "40", "53", "57P")
#: And these: the server is read-only, as after a failover, or a lock was not free in time.
_ALSO_PASSING = ("25006", "55P03")

#: What SQLite says if another process is writing, or there is no room: it has no SQLSTATEs.
_SQLITE_PASSING = ("database is locked", "database table is locked", "database schema is locked", "is full")


def is_transient(error: BaseException) -> bool:
    """Return whether an error passes by waiting: the database is away, fails over, is busy or full.

    It is told by the error's code. Whether the statement was committed, nobody knows then: close the connection, and do
    the same thing again, with the same key. An error about one statement (a missing table, a wrong value, its time
    limit) does not pass, whatever its class.

    Args:
        error: what Peewee or this library raised.
    """
    error = unhidden(error)
    if isinstance(error, MaxConnectionsExceeded) or (isinstance(error, StageConflict) and error.found is None):
        return True
    # Peewee does not wrap what SQLite says while rows are fetched.
    if not isinstance(error, (peewee.PeeweeException, sqlite3.Error)):
        return False
    code = sqlstate(error)
    if code is not None:
        return code.startswith(_PASSING) or code in _ALSO_PASSING
    if isinstance(current().database, peewee.SqliteDatabase):
        return any(sentence in str(error) for sentence in _SQLITE_PASSING)
    # Without a code, the server said nothing: there is no connection. psycopg2 then may raise the base class itself.
    return isinstance(error, (peewee.OperationalError, peewee.InterfaceError)) or type(error) is peewee.DatabaseError


def bind(
    database: peewee.Database | peewee.DatabaseProxy,
    *,
    leads: str | None = None,
    users: str | None = None,
    clients: str | None = None,
    clock: Callable[[], datetime] = utc_now,
    region: str | None = None,
    words: Mapping[str, Keyword] | None = None,
) -> peewee.Database:
    """Bind every model of this library to your own Peewee database.

    Args:
        database: a PostgresqlDatabase or SqliteDatabase, or of a class that is derived from one, such as the pools. The
            guide lists which. Of a DatabaseProxy, the database that it stands for now.
        leads, users, clients: names of the CRM's tables; see `Tables.named` for the defaults.
        clock: a function that returns the current moment with a timezone; tests pass one that they can move.
        region: two letters, such as US: where phone numbers without a country code are from. The default is the
            environment variable CLOSE_ENGINE_REGION. It needs the extra `close-engine[phone]`.
        words: the words by which people opt out and in, instead of the carriers' own; see `close_engine.KEYWORDS`.

    Returns:
        the database.

    Raises:
        ConfigurationError: it is no database that this library can use, or a table cannot have the name that is given,
            or there is no such region or keyword. What was bound before stays bound.
    """
    global _binding
    database = _database_in(database)
    dialect = _dialect_of(database)
    region = region or os.environ.get("CLOSE_ENGINE_REGION") or None
    require_region(region)
    binding = Binding(database, Tables.named(leads, users, clients), clock, dialect, region, lexicon(words))
    _check_names(binding.tables, dialect)
    dialect.prepare(database)
    # The migrations read the names from the database object: they import nothing from this package.
    database.close_engine_tables = vars(binding.tables)  # type: ignore[attr-defined]
    _binding = binding
    _bound.add(database)
    note_openers(database)
    database_proxy.initialize(database)
    return database


def _check_names(tables: Tables, dialect: Dialect) -> None:
    """Refuse names that the CRM's tables cannot have."""
    taken = dict.fromkeys(_OURS, "this library's own table has that name")
    for table, name in vars(tables).items():
        label = f"The name of the CRM's {table} table"
        try:
            folded = dialect.folded(clean_text(label, name))
        except InvalidValue as error:
            raise ConfigurationError(str(error)) from None
        why = "it is empty" if not name else taken.get(folded) or dialect.why_no_table(name)
        if why:
            raise ConfigurationError(f"{label} cannot be {name!r}: {why}.")
        taken[folded] = f"its {table} table has that name, and they must be two tables"


def require_bound(database: Any) -> None:
    """Refuse to move the models to another database than the one that is bound: only some of the library would follow.

    Raises:
        ConfigurationError: it is another database.
    """
    while isinstance(database, peewee.Proxy) and database is not database_proxy and database.obj is not None:
        database = database.obj
    if database is not database_proxy and (_binding is None or database is not _binding.database):
        raise ConfigurationError(
            "The models of close_engine are on the database that close_engine.bind() was given, and bind_ctx() and "
            "Model.bind() cannot move them to another one, because their triggers would stay behind: call "
            "close_engine.bind(database). If only your own models are meant, pass bind_refs=False and "
            "bind_backrefs=False."
        )


#: Databases that Peewee offers and this library cannot use: why, and what to bind instead. They are known by name,
#: because most can only be imported if their driver is installed.
_UNUSABLE = {
    "APSWDatabase": ("its driver takes no datetimes", "a SqliteDatabase, CySqliteDatabase or SqlCipherDatabase"),
    "AsyncDatabaseMixin": (
        "its queries must be awaited",
        "a PostgresqlDatabase or SqliteDatabase, and call this library with asyncio.to_thread()",
    ),
    "CockroachDatabase": ("the stages are guarded by triggers and locks of PostgreSQL's own", "a PostgresqlDatabase"),
    "SqliteQueueDatabase": ("it has no transactions", "a SqliteDatabase with a timeout, to wait for other writers"),
}


def _database_in(given: Any) -> peewee.Database:
    """Return the database that was given to `bind`, itself or in a proxy."""
    while isinstance(given, peewee.Proxy) and given.obj is not None:
        given = given.obj
    if isinstance(given, peewee.Database):
        return given
    if isinstance(given, peewee.Proxy):
        what = f"a {type(given).__name__} that is not initialized"
    elif isinstance(given, type):
        what = f"the class {given.__name__}"
    else:
        what = "None" if given is None else f"an object of the type {type(given).__name__}"
    raise ConfigurationError(
        f"bind() takes a Peewee database, not {what}: bind peewee.PostgresqlDatabase(…), or connect() to a URL."
    )


def _dialect_of(database: peewee.Database) -> Dialect:
    kind = type(database).__name__
    for base in type(database).__mro__:
        if base.__name__ in _UNUSABLE:
            why, instead = _UNUSABLE[base.__name__]
            raise ConfigurationError(f"{kind} cannot be bound, because {why}: bind {instead}.")
    if getattr(database, "_server_side_cursors", False):
        raise ConfigurationError(
            f"This {kind} cannot be bound, because a server-side cursor cannot lock rows: make it without "
            "server_side_cursors, and give a large query to playhouse.postgres_ext.ServerSide()."
        )
    if not database.thread_safe:
        raise ConfigurationError(
            f"This {kind} cannot be bound, because its threads would share one transaction: make it without "
            "thread_safe=False."
        )
    if isinstance(database, peewee.PostgresqlDatabase):
        return POSTGRES
    if isinstance(database, peewee.SqliteDatabase):
        version = database.server_version
        if version < _SQLITE_NEEDED:
            raise ConfigurationError(f"SQLite {'.'.join(map(str, version))} is too old: 3.35 or newer is needed.")
        return SQLITE
    raise ConfigurationError(f"{kind} is not supported: bind a PostgreSQL or SQLite database.")
