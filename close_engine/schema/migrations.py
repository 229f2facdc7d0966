"""The schema: run the migrations, list them, take them back.

    close_engine.connect("postgresql://…")
    close_engine.migrate()           # safe from many workers at once; all of it or nothing

The scripts stand in `migrations/` and are run by `playhouse.migrations`; which of them ran is recorded in
`close_engine.migrations` on PostgreSQL and in `close_engine_migrations` on SQLite.

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:")
>>> migrate(standalone=True)[0]
'0001_conversations'
>>> migrate()
[]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import get_ident
from typing import Any

import peewee
from playhouse.migrations import MigrationError, Runner

from close_engine.database.binding import Binding, current
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue, SchemaError, first_line
from close_engine.models import BaseModel

__all__ = ["LOCK_TIMEOUT", "MigrationStatus", "migrate", "migration_sql", "downgrade", "status"]

#: How long one process waits for another that migrates.
LOCK_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class MigrationStatus:
    """One migration.

    Attributes:
        name: the script's name.
        applied_at: when it was applied, in the local time of the machine that did; None where it is pending.
        known: False where the database has it, but this version of the library does not.
    """

    name: str
    applied_at: datetime | None
    known: bool


def directory() -> Path:
    """Where the migration scripts are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def migrate(*, standalone: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Apply every pending migration to the bound database, in one transaction.

    Many processes may do so at once: one migrates, the others wait and find nothing left to do.

    Args:
        standalone: first make minimal leads, users and clients tables where there are none; for a database without
            a CRM.
        lock_timeout: how long to wait for another process that migrates.

    Returns:
        the names of the migrations that were applied.

    Raises:
        SchemaError: the CRM's tables are missing, something there does not match, the database refuses a statement
            (no right to make tables, say), or another process held the lock of migrations for too long; nothing was
            changed.
        InvalidValue: the lock_timeout is not longer than nothing.
    """
    binding = current()
    _check_timeout(lock_timeout)
    if not standalone and not pending():
        return []
    with _alone(binding, lock_timeout):
        return _apply(binding, standalone)


def migration_sql(*, standalone: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """The statements that `migrate` would run now, without leaving a trace: they are run and rolled back.

    Args:
        standalone, lock_timeout: as for `migrate`.

    Returns:
        SQL, with its values in it: a script to run in one transaction. It records the migrations as applied, too.

    Raises:
        SchemaError, InvalidValue: as for `migrate`.
    """
    binding = current()
    statements: list[str] = []
    mine = get_ident()

    def record(event: Any) -> None:
        # The hooks of a database hear of every thread's statements.
        if get_ident() == mine and event.sql.split(None, 1)[0].upper() not in _LEAVE_NO_TRACE:
            sql = _with_values(event.sql, event.params or (), binding.database.param)
            statements.append(sql.strip().removesuffix(";"))

    with _alone(binding, lock_timeout) as transaction:
        binding.database.query_hooks.append(record)
        try:
            _apply(binding, standalone)
        finally:
            binding.database.query_hooks.remove(record)
        transaction.rollback()
    return statements


def downgrade(target: str | None = None, *, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Take migrations back, in one transaction of its own. What they made is dropped, WITH THE DATA IN IT.

    What Prisma had made before, and the migrations only adopted, stays; so do minimal tables of a CRM.

    Args:
        target: go back through this migration; the default is the newest alone.
        lock_timeout: as for `migrate`.

    Returns:
        the names of the migrations that were taken back.

    Raises:
        SchemaError: there is no such migration to take back, something depends on what it made, another process held
            the lock of migrations for too long, or a transaction is open; nothing was changed.
        InvalidValue: the lock_timeout is not longer than nothing.
    """
    binding = current()
    if binding.database.in_transaction():
        raise SchemaError(
            "Nothing was changed: downgrade() drops tables with their data, and here a transaction is open that could "
            "still be rolled back. End the transaction first."
        )
    with _alone(binding, lock_timeout):
        return _take_back(binding, target)


def _take_back(binding: Binding, target: str | None) -> list[str]:
    runner = _runner(binding)
    reverted: list[str] = runner.down(target)
    if reverted and not runner.applied():
        # Nothing of ours is left but the record of it.
        runner.History.drop_table()
        binding.dialect.drop_schema(binding.database)
    return reverted


def status() -> list[MigrationStatus]:
    """Every migration, applied or pending, in order.

    Raises:
        SchemaError: the database's role may not read which were applied.
    """
    try:
        return [MigrationStatus(m.name, m.applied, m.path is not None) for m in _runner(current()).status()]
    except peewee.ProgrammingError as error:
        raise SchemaError(
            f"The database refuses: {first_line(error)}; a right is its owner's to grant, and to read which "
            "migrations were applied takes USAGE of the schema close_engine and SELECT on its tables."
        ) from error


def rows_at_stake(target: str | None = None, *, lock_timeout: timedelta = LOCK_TIMEOUT) -> dict[str, int]:
    """What `downgrade` would drop: it is tried, and rolled back.

    Args:
        target, lock_timeout: as for `downgrade`.

    Returns:
        name of a table, or of a column added to one of the CRM's, to the number of rows that have something in it;
        what is empty is left out.

    Raises:
        SchemaError, InvalidValue: as for `downgrade`; a transaction may be open.
    """
    binding = current()
    with _alone(binding, lock_timeout) as transaction:
        before = _rows_of_ours()
        _take_back(binding, target)
        after = _rows_of_ours()
        transaction.rollback()
    return {name: count for name, count in before.items() if name not in after}


def _rows_of_ours() -> dict[str, int]:
    """By name of a table, or of a column that was added to one of the CRM's: how many rows have something in it."""
    binding = current()
    catalog = binding.dialect.catalog(binding.database)
    schema, record = binding.dialect.own_table("created")
    if not catalog.columns(record, schema):
        return {}
    created = set(binding.database.execute_sql(binding.dialect.sql("SELECT * FROM {created}")).fetchall())
    counted = {}
    for model in BaseModel.__subclasses__():
        meta = model._meta
        if not catalog.columns(meta.table_name, meta.schema):
            continue
        if hasattr(meta, "own_table") or (meta.table_name, "") in created:
            counted[".".join(filter(None, (meta.schema, meta.table_name)))] = binding.count(model.select())
        for field in meta.sorted_fields:
            if (meta.table_name, field.column_name) in created:
                filled = field.is_null(False) if field.default is None else field != field.default
                counted[f"{meta.table_name}.{field.column_name}"] = binding.count(model.select().where(filled))
    return {name: count for name, count in counted.items() if count}


class _Runner(Runner):  # type: ignore[misc]
    """Peewee's runner, but with a look into our own catalog: Peewee's calls functions of PostgreSQL unqualified."""

    def applied(self) -> dict[str, datetime]:
        if not current().dialect.catalog(self.database).columns(self.table_name, self.schema):
            return {}
        return {row.name: row.applied for row in self.History.select()}


def _runner(binding: Binding) -> Any:
    schema, table = binding.dialect.own_table("migrations")
    return _Runner(binding.database, str(directory()), table_name=table, schema=schema)


def pending() -> list[str]:
    """The names of the migrations that are still to be applied; errors as for `status`."""
    return [migration.name for migration in status() if migration.applied_at is None]


def _check_timeout(lock_timeout: timedelta) -> None:
    if lock_timeout <= timedelta(0):
        raise InvalidValue("lock_timeout", str(lock_timeout), "it must be longer than nothing")


@contextmanager
def _alone(binding: Binding, lock_timeout: timedelta) -> Iterator[atomic]:
    """A transaction in which no other process migrates this database."""
    _check_timeout(lock_timeout)
    # What fails at the commit is not told as SchemaError: whether anything was changed is then not known.
    with binding.dialect.limit_wait(binding.database, lock_timeout), atomic() as transaction, _schema_errors():
        binding.dialect.lock_migrations(binding.database, lock_timeout)
        yield transaction


def _apply(binding: Binding, standalone: bool) -> list[str]:
    if standalone:
        _create_crm_tables(binding)
    if not pending():
        return []
    binding.dialect.create_schema(binding.database)
    applied: list[str] = _runner(binding).up()
    return applied


def _create_crm_tables(binding: Binding) -> None:
    """The least that the migrations and the models ask of a CRM."""
    definitions = {
        binding.tables.users: "name TEXT",
        binding.tables.leads: "phone TEXT, name TEXT",
        binding.tables.clients: "lead_id TEXT",
    }
    for table, columns in definitions.items():
        quoted = '"' + table.replace('"', '""') + '"'
        if binding.database.param == "%s":
            quoted = quoted.replace("%", "%%")  # which psycopg2 reads as a %, and a lone % as a placeholder
        binding.database.execute_sql(f"CREATE TABLE IF NOT EXISTS {quoted} (id TEXT NOT NULL PRIMARY KEY, {columns})")


@contextmanager
def _schema_errors() -> Iterator[None]:
    try:
        yield
    except MigrationError as error:
        summary, *problems = str(error).split("\n  - ")
        raise SchemaError(f"Nothing was changed: {summary}", problems) from error
    except peewee.DatabaseError as error:
        raise SchemaError(f"Nothing was changed: the database refuses, {first_line(error)}.") from error


_LEAVE_NO_TRACE = ("SELECT", "PRAGMA", "SAVEPOINT", "RELEASE")


def _with_values(sql: str, values: Sequence[Any], mark: str) -> str:
    """The statement with its values in place of the marks."""
    left = iter(values)
    if mark == "%s":
        # psycopg2 reads %% as a %, also where there are no values.
        return re.sub("%[s%]", lambda found: "%" if found[0] == "%%" else _literal(next(left)), sql)
    return re.sub(re.escape(mark), lambda _: _literal(next(left)), sql) if values else sql


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (int, float)):
        return "NULL" if value is None else str(value)
    return "'" + str(value).replace("'", "''") + "'"
