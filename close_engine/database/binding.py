"""What the models are bound to: the one piece of global state.

Everything else asks `current()` for the binding and lets its `dialect` say how a thing is done here:

>>> import peewee
>>> database = bind(peewee.SqliteDatabase(":memory:"))
>>> current().dialect.own_table("history")
(None, 'close_engine_history')
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import peewee

from close_engine.database.dialect import Dialect
from close_engine.database.fields import milliseconds
from close_engine.database.postgresql import POSTGRES
from close_engine.database.provenance import Provenance, Write
from close_engine.database.sqlite import SQLITE
from close_engine.errors import ConfigurationError

__all__ = ["Binding", "Tables", "bind", "current", "database_proxy", "is_transient", "now", "utc_now"]

_SQLITE_NEEDED = (3, 35, 0)


@dataclass(frozen=True)
class Tables:
    """The names of the CRM's three tables, which differ between deployments.

    Attributes:
        leads: name of the table of leads.
        users: of users.
        clients: of clients.
    """

    leads: str
    users: str
    clients: str

    @classmethod
    def named(cls, leads: str | None = None, users: str | None = None, clients: str | None = None) -> Tables:
        """The names given. Each defaults to its environment variable (`CLOSE_ENGINE_LEADS_TABLE`,
        `CLOSE_ENGINE_USERS_TABLE`, `CLOSE_ENGINE_CLIENTS_TABLE`), and that to what Prisma calls it with `@@map`."""
        given = {"leads": leads, "users": users, "clients": clients}
        return cls(
            **{
                table: name or os.environ.get(f"CLOSE_ENGINE_{table.upper()}_TABLE") or table
                for table, name in given.items()
            }
        )


@dataclass(frozen=True)
class Binding:
    """The one piece of global state: what the models are bound to."""

    database: peewee.Database
    tables: Tables
    clock: Callable[[], datetime]
    dialect: Dialect

    def execute(self, text: str, parameters: Sequence[Any] = ()) -> Any:
        """Run a statement of ours, written as `Dialect.sql` takes it, and return its cursor."""
        return self.database.execute_sql(self.dialect.sql(text), parameters)

    def for_update(self, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        """Inside a transaction: make the query lock the rows it finds against every other writer."""
        return self.dialect.for_update(self.database, query)

    def attributed(self, provenance: Provenance, write: Write) -> AbstractContextManager[None]:
        """Inside a transaction: have the history carry this provenance for the write made within the block."""
        return self.dialect.attributed(self.database, provenance, write)

    def count(self, query: peewee.ModelSelect[Any]) -> int:
        """How many rows a query without an order finds: Peewee's own `count()` calls the function unqualified."""
        return int(query.select(self.dialect.function("count", peewee.SQL("*"))).scalar() or 0)


class _NotBound(ConfigurationError, AttributeError):
    """An AttributeError as well, as who looks for an attribute of the proxy expects."""


class _DatabaseProxy(peewee.DatabaseProxy):
    def __getattr__(self, name: str) -> Any:
        return getattr(current().database, name)


#: What the models are bound to, in Peewee's own way; `bind` initializes it.
database_proxy = _DatabaseProxy()

_binding: Binding | None = None


def utc_now() -> datetime:
    """The clock that is used unless `bind` is given another."""
    return datetime.now(timezone.utc)


def current() -> Binding:
    """The binding made by `bind` or `connect`.

    Raises:
        ConfigurationError: there is none yet.
    """
    if _binding is None:
        raise _NotBound("No database is bound: call close_engine.connect(url) or close_engine.bind(database) first.")
    return _binding


def now() -> datetime:
    """The current moment by the binding's clock: timezone-aware UTC, in milliseconds.

    Raises:
        ConfigurationError: the clock's moments have no timezone.
    """
    moment = current().clock()
    if moment.utcoffset() is None:
        raise ConfigurationError(f"The clock says {moment} without a timezone: bind one that says it in UTC.")
    return milliseconds(moment)


def is_transient(error: BaseException) -> bool:
    """Whether the database failed and not the statement: it is away, or others were in the way. Try again later."""
    # Where the server went away without a word, psycopg2 raises the base class itself.
    return isinstance(error, (peewee.OperationalError, peewee.InterfaceError)) or type(error) is peewee.DatabaseError


def bind(
    database: peewee.Database,
    *,
    leads: str | None = None,
    users: str | None = None,
    clients: str | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> peewee.Database:
    """Bind every model of this library to a Peewee database of yours.

    Args:
        database: a PostgresqlDatabase or SqliteDatabase, pooled or not.
        leads, users, clients: names of the CRM's tables; see `Tables.named` for the defaults.
        clock: returns the current moment, timezone-aware; tests pass one that they can move.

    Returns:
        the database.

    Raises:
        ConfigurationError: it is neither PostgreSQL nor SQLite, or a SQLite older than 3.35.
    """
    global _binding
    binding = Binding(database, Tables.named(leads, users, clients), clock, _dialect_of(database))
    # The migrations read the names from the database object: they import nothing of this package.
    database.close_engine_tables = vars(binding.tables)  # type: ignore[attr-defined]
    _binding = binding
    binding.dialect.prepare(database)
    database_proxy.initialize(database)
    return database


def _dialect_of(database: peewee.Database) -> Dialect:
    if isinstance(database, peewee.PostgresqlDatabase):
        return POSTGRES
    if isinstance(database, peewee.SqliteDatabase):
        version = database.server_version
        if version < _SQLITE_NEEDED:
            raise ConfigurationError(f"SQLite {'.'.join(map(str, version))} is too old: 3.35 or newer is needed.")
        return SQLITE
    raise ConfigurationError(f"{type(database).__name__} is not supported: bind a PostgreSQL or SQLite database.")
