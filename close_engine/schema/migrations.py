"""Migrate, downgrade, and list the migrations.

    close_engine.connect("postgresql://…")
    close_engine.migrate()           # all or nothing; many workers may call it at once

`playhouse.migrations` runs the scripts in `migrations/`. The log of what ran is `close_engine.migrations` on PostgreSQL
and `close_engine_migrations` on SQLite.

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

#: How long a process waits for another one that migrates.
LOCK_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class MigrationStatus:
    """One migration.

    Attributes:
        name: str, the script's name.
        applied_at: datetime, when it was applied, in the local time of the machine that applied it; None if pending.
        known: bool, False if the database has it but this version of the library does not.
    """

    name: str
    applied_at: datetime | None
    known: bool


def directory() -> Path:
    """Return where the migration scripts are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def migrate(*, standalone: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Apply every pending migration to the bound database, in one transaction.

    Many processes may call it at once: one migrates, the others wait and then find nothing to do.

    Args:
        standalone: bool, first create minimal leads, users and clients tables if they are missing; for a database
            without a CRM.
        lock_timeout: timedelta, how long to wait for another process that migrates.

    Returns:
        list of str, the names of the migrations that were applied.

    Raises:
        SchemaError: the CRM's tables are missing, an existing table does not match, the database refused a statement
            (for example, because the role may not create tables), or another process held the migration lock for too
            long. Nothing was changed.
        InvalidValue: the lock_timeout is not greater than zero.
    """
    binding = current()
    _check_timeout(lock_timeout)
    if not standalone and not pending():
        return []
    with _migration_lock(binding, lock_timeout):
        return _apply(binding, standalone)


def migration_sql(*, standalone: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Return the statements that `migrate` would run now: run them, record them, and roll them back.

    Args:
        standalone, lock_timeout: as for `migrate`.

    Returns:
        list of str, SQL with the values filled in: a script to run in one transaction. It also writes the log of
            migrations.

    Raises:
        SchemaError, InvalidValue: as for `migrate`.
    """
    binding = current()
    statements: list[str] = []
    this_thread = get_ident()

    def record(event: Any) -> None:
        # A database calls its hooks for the statements of every thread.
        if get_ident() == this_thread and event.sql.split(None, 1)[0].upper() not in _NOT_IN_SCRIPT:
            sql = _with_values(event.sql, event.params or (), binding.database.param)
            statements.append(sql.strip().removesuffix(";"))

    with _migration_lock(binding, lock_timeout) as transaction:
        binding.database.query_hooks.append(record)
        try:
            _apply(binding, standalone)
        finally:
            binding.database.query_hooks.remove(record)
        transaction.rollback()
    return statements


def downgrade(target: str | None = None, *, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Undo migrations, in a transaction of its own. Drops what they created, WITH THE DATA IN IT.

    Tables and columns that existed before, because Prisma created them, stay. So do the minimal tables of a CRM.

    Args:
        target: str, the last migration to undo; all newer ones are undone too. The default is only the newest.
        lock_timeout: timedelta, as for `migrate`.

    Returns:
        list of str, the names of the migrations that were undone.

    Raises:
        SchemaError: no such migration is applied, something depends on what it created, another process held the
            migration lock for too long, or a transaction is open. Nothing was changed.
        InvalidValue: the lock_timeout is not greater than zero.
    """
    binding = current()
    if binding.database.in_transaction():
        raise SchemaError(
            "Nothing was changed: downgrade() drops tables with their data, so it does not run in an open transaction, "
            "which might still be rolled back. End the transaction first."
        )
    with _migration_lock(binding, lock_timeout):
        return _undo(binding, target)


def _undo(binding: Binding, target: str | None) -> list[str]:
    runner = _runner(binding)
    reverted: list[str] = runner.down(target)
    if reverted and not runner.applied():
        # Only the library's log is left.
        runner.History.drop_table()
        binding.dialect.drop_schema(binding.database)
    return reverted


def status() -> list[MigrationStatus]:
    """List every migration, applied or pending, in order.

    Returns:
        list of MigrationStatus.

    Raises:
        SchemaError: the role may not read the log of migrations.
    """
    try:
        return [MigrationStatus(m.name, m.applied, m.path is not None) for m in _runner(current()).status()]
    except peewee.ProgrammingError as error:
        raise SchemaError(
            f"Database error: {first_line(error)}. To read which migrations were applied, this role needs USAGE "
            "on the schema close_engine and SELECT on its tables: ask their owner to grant both."
        ) from error


def rows_at_stake(target: str | None = None, *, lock_timeout: timedelta = LOCK_TIMEOUT) -> dict[str, int]:
    """Count the rows that `downgrade` would drop: downgrade, count, and roll back.

    Args:
        target, lock_timeout: as for `downgrade`.

    Returns:
        dict of str to int: table, or column added to a CRM's table, to the number of rows with data in it. Empty ones
            are left out.

    Raises:
        SchemaError, InvalidValue: as for `downgrade`, except that a transaction may be open.
    """
    binding = current()
    with _migration_lock(binding, lock_timeout) as transaction:
        before = _filled_rows()
        _undo(binding, target)
        after = _filled_rows()
        transaction.rollback()
    return {name: count for name, count in before.items() if name not in after}


def _filled_rows() -> dict[str, int]:
    """Count the rows with data, for each of the library's tables and each column added to a CRM's table."""
    binding = current()
    catalog = binding.dialect.catalog(binding.database)
    schema, record = binding.dialect.own_table("created")
    if not catalog.columns(record, schema):
        return {}
    created = set(binding.execute("SELECT * FROM {created}").fetchall())
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
    """Peewee's runner, but reading the dialect's catalog: Peewee's own queries do not name the schema of functions."""

    def applied(self) -> dict[str, datetime]:
        if not current().dialect.catalog(self.database).columns(self.table_name, self.schema):
            return {}
        return {row.name: row.applied for row in self.History.select()}


def _runner(binding: Binding) -> Any:
    schema, table = binding.dialect.own_table("migrations")
    return _Runner(binding.database, str(directory()), table_name=table, schema=schema)


def pending() -> list[str]:
    """Return the names of the migrations that are not applied yet. Raises what `status` raises."""
    return [migration.name for migration in status() if migration.applied_at is None]


def _check_timeout(lock_timeout: timedelta) -> None:
    if lock_timeout <= timedelta(0):
        raise InvalidValue("lock_timeout", str(lock_timeout), "it must be greater than zero")


@contextmanager
def _migration_lock(binding: Binding, lock_timeout: timedelta) -> Iterator[atomic]:
    """Run a transaction in which no other process migrates this database."""
    _check_timeout(lock_timeout)
    # An error at the commit is not turned into a SchemaError: then nobody knows whether anything was changed.
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
    """Create minimal leads, users and clients tables."""
    definitions = {
        binding.tables.users: "name TEXT",
        binding.tables.leads: "phone TEXT, name TEXT",
        binding.tables.clients: "lead_id TEXT",
    }
    for table, columns in definitions.items():
        quoted = '"' + table.replace('"', '""') + '"'
        if binding.database.param == "%s":
            quoted = quoted.replace("%", "%%")  # psycopg2 takes a single % for a placeholder
        binding.database.execute_sql(f"CREATE TABLE IF NOT EXISTS {quoted} (id TEXT NOT NULL PRIMARY KEY, {columns})")


@contextmanager
def _schema_errors() -> Iterator[None]:
    try:
        yield
    except MigrationError as error:
        summary, *problems = str(error).split("\n  - ")
        raise SchemaError(f"Nothing was changed: {summary}", problems) from error
    except peewee.DatabaseError as error:
        raise SchemaError(f"Nothing was changed: the database refused a statement ({first_line(error)}).") from error


#: Statements that change nothing, or only make sense in the transaction that is rolled back.
_NOT_IN_SCRIPT = ("SELECT", "PRAGMA", "SAVEPOINT", "RELEASE")


def _with_values(sql: str, values: Sequence[Any], mark: str) -> str:
    """Return the statement with its values in place of the placeholders."""
    left = iter(values)
    if mark == "%s":
        # psycopg2 takes %% for a %, even if there are no values.
        return re.sub("%[s%]", lambda found: "%" if found[0] == "%%" else _literal(next(left)), sql)
    return re.sub(re.escape(mark), lambda _: _literal(next(left)), sql) if values else sql


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (int, float)):
        return "NULL" if value is None else str(value)
    return "'" + str(value).replace("'", "''") + "'"
