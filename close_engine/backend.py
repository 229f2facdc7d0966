"""Which database this is: the binding, and the one place that knows what differs between databases.

Everything else asks `current()` for the binding and lets its `dialect` say how a thing is done here:

>>> database = connect("sqlite:///:memory:")
>>> current().dialect.own_table("history")
(None, 'close_engine_history')
>>> Postgres().own_table("history")
('close_engine', 'history')
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any
from urllib.parse import unquote

import peewee
import psycopg2
from playhouse import db_url
from playhouse.pool import PooledDatabase
from psycopg2.extensions import parse_dsn

from close_engine.catalog import Catalog, PostgresCatalog, SqliteCatalog
from close_engine.errors import ConfigurationError
from close_engine.fields import dump_json, milliseconds

__all__ = [
    "DEFAULT_URL",
    "Binding",
    "Dialect",
    "Postgres",
    "Sqlite",
    "Tables",
    "bind",
    "connect",
    "current",
    "is_transient",
    "now",
]

DEFAULT_URL = "sqlite:///close_engine.db"

#: Query parameters that Prisma puts into its URLs and libpq does not know.
_PRISMA_ONLY = {
    "connection_limit",
    "pgbouncer",
    "pool_timeout",
    "socket_timeout",
    "sslaccept",
    "statement_cache_size",
}

#: As in the first migration, which makes the schema where it is run without this library.
_MADE_HERE = "Made by the migrations of close_engine, and dropped with them."

_ENCODE = "percent-encode the special characters in its user and password"

_POOL_OPTIONS = ("max_connections", "stale_timeout", "timeout")

_SQLITE_NEEDED = (3, 35, 0)

#: Seconds that a connection to SQLite waits for another's lock.
_SQLITE_WAITS = 60


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


class Dialect:
    """What differs between databases, stated once: one subclass a database."""

    #: What Peewee's `atomic()` is given where a transaction begins.
    begin: tuple[str, ...] = ()

    #: What reads the database's own description of itself.
    catalog: type[Catalog]

    def own_table(self, name: str) -> tuple[str | None, str]:
        """Schema and name of one of our tables that Prisma must not see."""
        raise NotImplementedError

    def sql(self, text: str) -> str:
        """The statement in this database's words: `%s` for a value, `{history}` for our tables."""
        raise NotImplementedError

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        """Text of the one statement that changes a stage; `execute_guarded` runs it."""
        raise NotImplementedError

    def execute_guarded(
        self, database: peewee.Database, statement: str, values: Sequence[Any], context: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """Run a guarded update, with the context that its history row is to carry.

        Returns:
            the returned columns and, behind them, the id of the history row; None where no row matched.
        """
        raise NotImplementedError

    @contextmanager
    def context(self, database: peewee.Database, context: dict[str, Any]) -> Iterator[None]:
        """Inside a transaction: what the guard records with the writes made within this block."""
        raise NotImplementedError
        yield

    def hold(self, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        """Inside a transaction: the query, holding the rows it finds against every other writer."""
        raise NotImplementedError

    #: The end of a query within a statement: hold the rows it finds against every other writer.
    hold_rows: str

    def skip_locked(self, *aliases: str) -> str:
        """The end of a query that takes the rows of these tables, but for those that another one holds."""
        raise NotImplementedError

    def ids_of(self, query: str) -> str:
        """What a column of ids is compared with, so that few rows are found by it and not a table searched for them."""
        raise NotImplementedError

    def sample(self, table: str, every: int) -> str:
        """A query for one of so many rows of a table of ours, the same ones each time and without an order."""
        raise NotImplementedError

    def merged_list(self, column: str) -> str:
        """What a JSON column becomes when a list is merged into it: each element once, in the order of its first."""
        raise NotImplementedError

    def merged_mapping(self, column: str) -> str:
        """What a JSON column becomes when a mapping is merged into it, key by key."""
        raise NotImplementedError

    def prepare(self, database: peewee.Database) -> None:
        """Once for a database: what its connections need."""

    def failed(self, database: peewee.Database) -> bool:
        """Inside a transaction: whether it would be rolled back even if it were told to commit."""
        return False

    def exclusive(self, database: peewee.Database) -> None:
        """Inside a transaction: wait until no other process migrates this database."""
        raise NotImplementedError

    def create_schema(self, database: peewee.Database) -> None:
        """Make room for our tables."""

    def drop_schema(self, database: peewee.Database) -> None:
        """Take away the room, if `create_schema` made it."""


class Postgres(Dialect):
    """PostgreSQL: our tables in a schema of their own, the context in a setting that ends with the transaction."""

    catalog = PostgresCatalog

    # NO KEY: the CRM may go on adding messages and events that refer to a held lead.
    hold_rows = "FOR NO KEY UPDATE"

    def own_table(self, name: str) -> tuple[str | None, str]:
        return "close_engine", name

    def sql(self, text: str) -> str:
        return text.replace("{", "close_engine.").replace("}", "")

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        # A condition, so that the context travels in the same statement and the same round trip.
        return self.sql(
            f'UPDATE "{table}" SET {assignments} WHERE {conditions} '
            "AND set_config('close_engine.context', %s, true) IS NOT NULL "
            f"RETURNING {returning}, currval('close_engine.history_id_seq')"
        )

    def execute_guarded(
        self, database: peewee.Database, statement: str, values: Sequence[Any], context: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = database.execute_sql(statement, (*values, dump_json(context))).fetchone()
        if row is None and database.in_transaction():
            # A write that lost its row while it waited for it has set the context all the same.
            database.execute_sql("SELECT set_config('close_engine.context', '', true)")
        return row

    @contextmanager
    def context(self, database: peewee.Database, context: dict[str, Any]) -> Iterator[None]:
        database.execute_sql("SELECT set_config('close_engine.context', %s, true)", (dump_json(context),))
        yield
        database.execute_sql("SELECT set_config('close_engine.context', '', true)")

    def hold(self, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        return query.for_update(self.hold_rows)  # type: ignore[arg-type]

    def skip_locked(self, *aliases: str) -> str:
        return f"{self.hold_rows} OF {', '.join(aliases)} SKIP LOCKED"

    def ids_of(self, query: str) -> str:
        return f"= ANY (ARRAY({query}))"

    def sample(self, table: str, every: int) -> str:
        return self.sql(f"SELECT * FROM {{{table}}} TABLESAMPLE BERNOULLI ({100 / every}) REPEATABLE (0)")

    def merged_list(self, column: str) -> str:
        return (
            "(SELECT jsonb_agg(element ORDER BY place) FROM (SELECT element, min(place) AS place FROM "
            f"jsonb_array_elements(CASE jsonb_typeof({column}) WHEN 'array' THEN {column} ELSE '[]' END || %s::jsonb) "
            "WITH ORDINALITY AS elements (element, place) GROUP BY element) AS merged)"
        )

    def merged_mapping(self, column: str) -> str:
        return f"CASE jsonb_typeof({column}) WHEN 'object' THEN {column} ELSE '{{}}' END || %s::jsonb"

    def failed(self, database: peewee.Database) -> bool:
        # The driver knows it, without a round trip; 3 is libpq's PQTRANS_INERROR.
        return bool(database.connection().info.transaction_status == 3)

    def exclusive(self, database: peewee.Database) -> None:
        database.execute_sql("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate'))")

    def create_schema(self, database: peewee.Database) -> None:
        # IF NOT EXISTS asks for the right to create schemas even where there is nothing to create.
        found = database.execute_sql("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine'")
        if not found.fetchall():
            database.execute_sql("CREATE SCHEMA close_engine")
            database.execute_sql(f"COMMENT ON SCHEMA close_engine IS '{_MADE_HERE}'")

    def drop_schema(self, database: peewee.Database) -> None:
        found = database.execute_sql(
            "SELECT obj_description(oid, 'pg_namespace') FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine'"
        )
        if found.fetchall() == [(_MADE_HERE,)]:
            database.execute_sql("DROP SCHEMA close_engine")


class Sqlite(Dialect):
    """SQLite: our tables carry a prefix, the context is a row that lives for the one write it belongs to."""

    #: Take the write lock at once: a transaction that reads first may be refused it later.
    begin = ("IMMEDIATE",)

    catalog = SqliteCatalog

    hold_rows = ""  # there is one writer at a time

    def own_table(self, name: str) -> tuple[str | None, str]:
        return None, f"close_engine_{name}"

    def sql(self, text: str) -> str:
        return text.replace("{", "close_engine_").replace("}", "").replace("%s", "?")

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        return self.sql(f'UPDATE "{table}" SET {assignments} WHERE {conditions} RETURNING {returning}')

    def execute_guarded(
        self, database: peewee.Database, statement: str, values: Sequence[Any], context: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        with database.atomic(*self.begin), self.context(database, context):
            rows = database.execute_sql(statement, values).fetchall()
            if not rows:
                return None
            newest = "SELECT max(id) FROM close_engine_history WHERE conversation_id = ?"
            (history_id,) = database.execute_sql(newest, (context["id"],)).fetchone()
        return (*rows[0], history_id)

    @contextmanager
    def context(self, database: peewee.Database, context: dict[str, Any]) -> Iterator[None]:
        database.execute_sql("INSERT OR REPLACE INTO close_engine_context VALUES (1, ?)", (dump_json(context),))
        yield
        database.execute_sql("DELETE FROM close_engine_context")

    def hold(self, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        # Writing anything takes the write lock, of which SQLite has one for the whole file.
        current().database.execute_sql("DELETE FROM close_engine_context")
        return query

    def skip_locked(self, *aliases: str) -> str:
        return self.hold_rows

    def ids_of(self, query: str) -> str:
        return f"IN ({query})"

    def sample(self, table: str, every: int) -> str:
        return self.sql(f"SELECT * FROM {{{table}}} WHERE rowid % {every} = 0")

    def merged_list(self, column: str) -> str:
        return f"close_engine_merge({column}, ?)"

    merged_mapping = merged_list

    def prepare(self, database: peewee.Database) -> None:
        database.register_function(_merge_json, "close_engine_merge", 2)  # type: ignore[attr-defined]

    def exclusive(self, database: peewee.Database) -> None:
        """BEGIN IMMEDIATE holds the file already."""


def _merge_json(stored: str | None, merged: str) -> str:
    """SQLite runs in this process, and has no JSON function that keeps a null and does not merge deeply."""
    old, new = json.loads(stored or "null"), json.loads(merged)
    if isinstance(new, dict):
        return dump_json({**(old if isinstance(old, dict) else {}), **new})
    elements = [*(old if isinstance(old, list) else []), *new]
    return dump_json([element for place, element in enumerate(elements) if element not in elements[:place]])


_POSTGRES, _SQLITE = Postgres(), Sqlite()


@dataclass(frozen=True)
class Binding:
    """The one piece of global state: what the models are bound to."""

    database: peewee.Database
    tables: Tables
    clock: Callable[[], datetime]
    dialect: Dialect


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


def connect(
    url: str | None = None,
    *,
    leads: str | None = None,
    users: str | None = None,
    clients: str | None = None,
    clock: Callable[[], datetime] = utc_now,
) -> peewee.Database:
    """Make a Peewee database from a URL and bind every model to it. It opens connections as they are needed.

    Args:
        url: `postgresql://user:password@host/name`, as in Prisma's DATABASE_URL, or `sqlite:///file.db`; the default
            is the environment variable CLOSE_ENGINE_DATABASE, and that of it `sqlite:///close_engine.db`.
            `postgresql+pool://…` keeps a pool of connections (see playhouse.db_url).
        leads, users, clients, clock: as for `bind`.

    Returns:
        the database.

    Raises:
        ConfigurationError: the URL cannot be used. No error shows its password.
    """
    url = url or os.environ.get("CLOSE_ENGINE_DATABASE") or DEFAULT_URL
    return bind(_database_from(url), leads=leads, users=users, clients=clients, clock=clock)


def without_password(url: str) -> str:
    """The URL as it may be shown, whatever is wrong with it."""
    url = re.sub(r"(password\w*\s*=\s*)('[^']*'|[^&\s]*)", r"\1***", url, flags=re.IGNORECASE)
    head, at, tail = url.rpartition("@")
    if at:
        return re.sub(r"(^(?:[^:]*://)?[^:]*:)(?!//).*", r"\1***", head, flags=re.DOTALL) + at + tail
    # Without a host, what should be the password stands where the port does.
    return re.sub(r"(://[^/?#:]+:)(?![0-9]+(?:[/?,]|$))[^/?#]+", r"\1***", url)


_URL = re.compile(
    r"(?P<scheme>(?P<kind>sqlite|postgres(?:ql)?)(?:\+pool)?)://(?P<place>(?:[^/@]*@)?[^?]+)(?:\?(?P<query>.*))?",
    re.DOTALL,
)


def _database_from(url: str) -> peewee.Database:
    try:
        match = _URL.fullmatch(url)
        if match is None:
            raise ValueError("write postgresql://user:password@host/name or sqlite:///file.db")
        query = dict(pair.partition("=")[::2] for pair in (match["query"] or "").split("&") if pair)
        database = db_url.schemes[match["scheme"]]
        options: dict[str, Any] = {}
        if issubclass(database, PooledDatabase):
            options = {name: _number(name, query.pop(name)) for name in _POOL_OPTIONS if name in query}
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
        raise ValueError(f"SQLite knows no parameter {', '.join(query)}")
    if not place.startswith("/"):
        raise ValueError(f"a file takes three slashes, sqlite:///{place}")
    return {
        "database": place[1:] or ":memory:",
        "factory": _WalConnection,
        "pragmas": [("foreign_keys", 1)],
    }


class _WalConnection(sqlite3.Connection):
    """A connection in WAL mode, which many processes may give a new file at once.

    SQLite lets one of them make the change and turns the others away without waiting, whatever their timeout.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute(f"PRAGMA busy_timeout = {_SQLITE_WAITS * 1000}")
        give_up = time.monotonic() + _SQLITE_WAITS
        while True:
            try:
                self.execute("PRAGMA journal_mode = wal")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > give_up:
                    raise
                time.sleep(0.001)


def _postgres_options(place: str, query: dict[str, str]) -> dict[str, Any]:
    """What psycopg2 is to be given; libpq itself reads the URL."""
    schema = unquote(query.pop("schema", "public"))
    known = "&".join(f"{name}={value}" for name, value in query.items() if name not in _PRISMA_ONLY)
    try:
        options: dict[str, Any] = parse_dsn(f"postgresql://{place}?{known}")
    except psycopg2.ProgrammingError as error:
        # What else libpq says may quote the password.
        unknown = re.search(r'URI query parameter: ("[^"]*")', str(error))
        raise ValueError(f"there is no parameter {unknown[1]}" if unknown else _ENCODE) from None
    if "@" in options.get("host", "") or "@" in place.partition("/")[2]:
        raise ValueError(_ENCODE)
    if not re.fullmatch("[0-9,]*", options.get("port", "")):
        raise ValueError("its port is not a number; a host follows the password after @")
    if "dbname" not in options:
        raise ValueError("it names no database")
    options["database"] = options.pop("dbname")
    if schema != "public":
        quoted = '"' + schema.replace('"', '""') + '"'
        search_path = "-c search_path=" + re.sub(r"([\\ ])", r"\\\1", quoted)
        options["options"] = f"{options.get('options', '')} {search_path}"
    return options


def _dialect_of(database: peewee.Database) -> Dialect:
    if isinstance(database, peewee.PostgresqlDatabase):
        return _POSTGRES
    if isinstance(database, peewee.SqliteDatabase):
        version = database.server_version
        if version < _SQLITE_NEEDED:
            raise ConfigurationError(f"SQLite {'.'.join(map(str, version))} is too old: 3.35 or newer is needed.")
        return _SQLITE
    raise ConfigurationError(f"{type(database).__name__} is not supported: bind a PostgreSQL or SQLite database.")
