"""Migrate, downgrade and repair.

    close_engine.connect("postgresql://…")
    close_engine.migrate()           # all or nothing; many workers may call it at once

The log of migrations is not believed without looking: what it promises and the database lacks is made again.

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
from datetime import timedelta
from threading import get_ident
from typing import Any

import peewee
from playhouse.migrations import MigrationError

from close_engine.database.binding import Binding, current
from close_engine.database.dialect import identifier
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue, SchemaError, first_line
from close_engine.models import BaseModel
from close_engine.schema.checks import checks, lost, other_crm
from close_engine.schema.problems import Problem, current_catalog, literal, table_name
from close_engine.schema.scripts import pending, runner, status
from close_engine.schema.structure import CRM_COLUMNS

__all__ = ["LOCK_TIMEOUT", "downgrade", "migrate", "migration_sql", "repair", "rows_at_stake"]

#: How long a process waits for another one that migrates.
LOCK_TIMEOUT = timedelta(minutes=5)


def migrate(*, standalone: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Apply every pending migration to the bound database, in one transaction.

    Many processes may call it at once: one migrates, the others wait and then find nothing to do. If something is gone
    that an applied migration had made, all migrations are applied again, which makes it whole and keeps every row. That
    happens after `prisma migrate reset`, for example.

    Args:
        standalone: bool, first create minimal leads, users and clients tables if they are missing; for a database
            without a CRM.
        lock_timeout: timedelta, how long to wait for another process that migrates.

    Returns:
        list of str, the names of the migrations that were applied.

    Raises:
        SchemaError: the CRM's tables are missing, an existing table does not match, the database serves another CRM,
            the database refused a statement (for example, because the role may not create tables), or another process
            held the migration lock for too long. Nothing was changed.
        InvalidValue: the lock_timeout is not greater than zero.
    """
    binding = current()
    _check_timeout(lock_timeout)
    _refuse_second_crm()
    if not standalone and not pending() and not lost():
        return []
    with _migration_lock(binding, lock_timeout):
        return _apply(binding, standalone)


def repair(*, lock_timeout: timedelta = LOCK_TIMEOUT) -> list[str]:
    """Mend what `verify` finds, as far as no data is lost, in one transaction.

    Migrations are applied again, which makes what is missing. Sequences, rights, stamps and the history of
    conversations that were changed past the guard are set right. Whatever needs a decision stays.

    Args:
        lock_timeout: timedelta, as for `migrate`.

    Returns:
        list of str, what was wrong and is no longer.

    Raises:
        SchemaError, InvalidValue: as for `migrate`.
    """
    binding = current()
    with _migration_lock(binding, lock_timeout):
        _refuse_newer()
        before = _problems()
        for problem in before:
            if problem.mend:
                binding.database.execute_sql(binding.dialect.escaped(problem.mend))
        if pending() or any(problem.again for problem in before):
            _apply(binding, standalone=False, again=True)
        left = {problem.what for problem in _problems()}
    return [problem.what for problem in before if problem.what not in left]


def _problems() -> list[Problem]:
    return [problem for check in checks() for problem in check.problems]


def migration_sql(
    *, standalone: bool = False, whole: bool = False, lock_timeout: timedelta = LOCK_TIMEOUT
) -> list[str]:
    """Return the statements that `migrate` would run now: run them, record them, and roll them back.

    Args:
        standalone, lock_timeout: as for `migrate`.
        whole: bool, also the migrations that were applied already. On a database in which Prisma has made the tables
            that it declares, the result is a script for every database in which it has made them.

    Returns:
        list of str, SQL with the values filled in: a script to run in one transaction. It also writes the log of
            migrations. It can run again, on the same database or after `prisma migrate reset`.

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
        if whole:
            _refuse_newer()
        binding.database.query_hooks.append(record)
        try:
            applied = _apply(binding, standalone, whole)
        finally:
            binding.database.query_hooks.remove(record)
        transaction.rollback()
    schema = binding.dialect.schema_sql
    if not applied or not schema:
        return statements
    return [schema, *(statement for statement in statements if statement != schema)]


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
    scripts = runner(binding)
    reverted: list[str] = scripts.down(target)
    if reverted and not scripts.applied():
        # Only the library's log is left.
        scripts.History.drop_table()
        binding.dialect.drop_schema(binding.database)
    return reverted


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
    """Count the rows with data, for each table of the library's and each column that it adds to a CRM's table."""
    binding, catalog = current(), current_catalog()
    counted = {}
    for model in BaseModel.__subclasses__():
        meta, name = model._meta, table_name(model)
        columns = catalog.columns(meta.table_name, meta.schema)
        if model not in CRM_COLUMNS:
            counted[name] = binding.count(model.select()) if columns else 0
            continue
        for field in meta.sorted_fields:
            if field.column_name in columns and field.column_name not in CRM_COLUMNS[model]:
                filled = field.is_null(False) if field.default is None else field != field.default
                counted[f"{name}.{field.column_name}"] = binding.count(model.select().where(filled))
    return {name: count for name, count in counted.items() if count}


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
        _refuse_second_crm()
        yield transaction


def _refuse_second_crm() -> None:
    if problem := other_crm():
        raise SchemaError(f"Nothing was changed. {problem}")


def _refuse_newer() -> None:
    """Refuse to apply everything again if a newer version may have changed it."""
    newer = [migration.name for migration in status() if not migration.known]
    if newer:
        raise SchemaError(
            f"Nothing was changed: a newer version has applied {', '.join(newer)}, and may have changed what this one "
            "would make again. Upgrade close-engine."
        )


def _apply(binding: Binding, standalone: bool, again: bool = False) -> list[str]:
    """Apply the pending migrations; then all of them `again`, also if something is gone that they had made."""
    if standalone:
        _create_crm_tables(binding)
    applied: list[str] = []
    if pending():
        if binding.dialect.schema_sql:
            binding.database.execute_sql(binding.dialect.schema_sql)
        applied = runner(binding).up()
    if not again and not lost():
        return applied
    applied = runner(binding, again=True).up()
    if left := lost():
        raise SchemaError("Nothing was changed: some things could not be made again.", list(map(str, left)))
    return applied


def _create_crm_tables(binding: Binding) -> None:
    """Create minimal leads, users and clients tables."""
    definitions = {
        binding.tables.users: "name TEXT",
        binding.tables.leads: "phone TEXT, name TEXT",
        binding.tables.clients: "lead_id TEXT",
    }
    for table, columns in definitions.items():
        quoted = binding.dialect.escaped(identifier(table))
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
    return literal(str(value))
