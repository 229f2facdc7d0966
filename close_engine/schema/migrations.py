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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import get_ident
from typing import Any

import peewee
from playhouse.migrations import MigrationError, Runner

from close_engine.database.binding import Binding, current
from close_engine.database.transaction import atomic
from close_engine.errors import SchemaError, first_line
from close_engine.models import BaseModel

__all__ = ["MigrationStatus", "migrate", "migration_sql", "downgrade", "status"]


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


def migrate(*, standalone: bool = False) -> list[str]:
    """Apply every pending migration to the bound database, in one transaction.

    Many processes may do so at once: one migrates, the others wait and find nothing left to do.

    Args:
        standalone: first make minimal leads, users and clients tables where there are none; for a database without
            a CRM.

    Returns:
        the names of the migrations that were applied.

    Raises:
        SchemaError: the CRM's tables are missing, something there does not match, or the database refuses a
            statement (no right to make tables, say); nothing was changed.
    """
    binding = current()
    if not standalone and not pending():
        return []
    with atomic(), _schema_errors():
        return _apply(binding, standalone)


def migration_sql(*, standalone: bool = False) -> list[str]:
    """The statements that `migrate` would run now, without leaving a trace: they are run and rolled back.

    Returns:
        one SQL statement each, with its values in it: a script to run in one transaction. It records the migrations
        as applied, too.

    Raises:
        SchemaError: as for `migrate`.
    """
    binding = current()
    statements: list[str] = []
    mine = get_ident()

    def record(event: Any) -> None:
        # The hooks of a database hear of every thread's statements.
        if get_ident() == mine and event.sql.split(None, 1)[0].upper() not in _LEAVE_NO_TRACE:
            statements.append(_with_values(event.sql.strip(), event.params or (), binding.database.param))

    with atomic() as transaction, _schema_errors():
        binding.database.query_hooks.append(record)
        try:
            _apply(binding, standalone)
        finally:
            binding.database.query_hooks.remove(record)
        transaction.rollback()
    return statements


def downgrade(target: str | None = None) -> list[str]:
    """Take migrations back, in one transaction. What they made is dropped, WITH THE DATA IN IT.

    What Prisma had made before, and the migrations only adopted, stays; so do minimal tables of a CRM.

    Args:
        target: go back through this migration; the default is the newest alone.

    Returns:
        the names of the migrations that were taken back.

    Raises:
        SchemaError: there is no such migration to take back, or something depends on what it made; nothing was
            changed.
    """
    binding = current()
    with atomic(), _schema_errors():
        binding.dialect.exclusive(binding.database)
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


def rows_at_stake(target: str | None = None) -> dict[str, int]:
    """What `downgrade` would drop: it is tried, and rolled back.

    Args:
        target: as for `downgrade`.

    Returns:
        name of a table, or of a column added to one of the CRM's, to the number of rows that have something in it;
        what is empty is left out.

    Raises:
        SchemaError: as for `downgrade`.
    """
    with atomic() as transaction:
        before = _rows_of_ours()
        downgrade(target)
        after = _rows_of_ours()
        transaction.rollback()
    return {name: count for name, count in before.items() if name not in after}


def _rows_of_ours() -> dict[str, int]:
    """By name of a table, or of a column that was added to one of the CRM's: how many rows have something in it."""
    binding = current()
    schema, record = binding.dialect.own_table("created")
    if not binding.database.table_exists(record, schema):
        return {}
    created = set(binding.database.execute_sql(binding.dialect.sql("SELECT * FROM {created}")).fetchall())
    counted = {}
    for model in BaseModel.__subclasses__():
        meta = model._meta
        if not binding.database.table_exists(meta.table_name, meta.schema):
            continue
        if hasattr(meta, "own_table") or (meta.table_name, "") in created:
            counted[".".join(filter(None, (meta.schema, meta.table_name)))] = model.select().count()
        for field in meta.sorted_fields:
            if (meta.table_name, field.column_name) in created:
                filled = field.is_null(False) if field.default is None else field != field.default
                counted[f"{meta.table_name}.{field.column_name}"] = model.select().where(filled).count()
    return {name: count for name, count in counted.items() if count}


def _runner(binding: Binding) -> Any:
    schema, table = binding.dialect.own_table("migrations")
    return Runner(binding.database, str(directory()), table_name=table, schema=schema)


def pending() -> list[str]:
    """The names of the migrations that are still to be applied; errors as for `status`."""
    return [migration.name for migration in status() if migration.applied_at is None]


def _apply(binding: Binding, standalone: bool) -> list[str]:
    binding.dialect.exclusive(binding.database)
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
    texts = sql.split(mark) if values else [sql]
    literals = [_literal(value) for value in values]
    return "".join(part for pair in zip(texts, [*literals, ""], strict=True) for part in pair)


def _literal(value: Any) -> str:
    if value is None or isinstance(value, (int, float)):
        return "NULL" if value is None else str(value)
    return "'" + str(value).replace("'", "''") + "'"
