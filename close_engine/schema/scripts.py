"""The migration scripts: where they are, which of them ran, and what they make.

`playhouse.migrations` runs the scripts in `migrations/`. The log of what ran is `close_engine.migrations` on PostgreSQL
and `close_engine_migrations` on SQLite. What the scripts make is read from their SQL files, which are what runs.

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:")
>>> [migration.applied_at for migration in status()][:1]
[None]
>>> "close_engine_conversations" in {trigger.table for trigger in triggers()}
True
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import peewee
from playhouse.migrations import Runner

from close_engine.database.binding import Binding, current
from close_engine.database.dialect import identifier
from close_engine.errors import SchemaError, first_line

__all__ = [
    "MigrationStatus",
    "ScriptFunction",
    "ScriptTrigger",
    "as_run",
    "directory",
    "functions",
    "pending",
    "runner",
    "status",
    "triggers",
]


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


@dataclass(frozen=True)
class ScriptTrigger:
    """A trigger that a migration makes.

    Attributes:
        schema: str, the schema of its table; None if that is the CRM's.
        table: str, the table it is on, without the schema.
        statement: str, the CREATE TRIGGER statement as it stands in the file; `as_run` translates it.
    """

    name: str
    schema: str | None
    table: str
    statement: str


@dataclass(frozen=True)
class ScriptFunction:
    """A function that a migration makes.

    Attributes:
        body: str, as it stands in the file; `as_run` translates it to what the database stores.
        protected: bool, whether it runs with its owner's rights and a fixed search_path.
        revoked: bool, whether nobody but its owner may execute it.
    """

    name: str
    body: str
    protected: bool
    revoked: bool


def directory() -> Path:
    """Return where the migration scripts are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def status() -> list[MigrationStatus]:
    """List every migration, applied or pending, in order.

    Returns:
        list of MigrationStatus.

    Raises:
        SchemaError: the role may not read the log of migrations.
    """
    try:
        return [MigrationStatus(m.name, m.applied, m.path is not None) for m in runner(current()).status()]
    except peewee.ProgrammingError as error:
        raise SchemaError(
            f"Database error: {first_line(error)}. To read which migrations were applied, this role needs USAGE "
            "on the schema close_engine and SELECT on its tables: ask their owner to grant both."
        ) from error


def pending() -> list[str]:
    """Return the names of the migrations that are not applied yet. Raises what `status` raises."""
    return [migration.name for migration in status() if migration.applied_at is None]


class _Runner(Runner):  # type: ignore[misc]
    """Peewee's runner, but it can run a migration again.

    It reads the dialect's catalog: Peewee's own queries do not name the schema of functions.
    """

    def __init__(self, *arguments: Any, again: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._again = again
        self.History.create = self._log

    def applied(self) -> dict[str, datetime]:
        if not current().dialect.catalog(self.database).columns(self.table_name, self.schema):
            return {}
        applied = {row.name: row.applied for row in self.History.select()}
        if self._again:
            for migration in self.migrations():
                applied.pop(migration.name, None)
        return applied

    def _log(self, name: str) -> None:
        log = self.History
        insert = log.insert(name=name, applied=datetime.now())
        insert.on_conflict(conflict_target=[log.name], preserve=[log.applied]).execute()


def runner(binding: Binding, *, again: bool = False) -> Any:
    """Make the runner of the migrations.

    Args:
        binding: the binding to run them on.
        again: bool, whether to count migrations as pending that were applied already.

    Returns:
        playhouse.migrations.Runner.
    """
    schema, table = binding.dialect.own_table("migrations")
    return _Runner(binding.database, str(directory()), table_name=table, schema=schema, again=again)


_TRIGGER = re.compile(
    r"^CREATE (?:OR REPLACE )?TRIGGER (?P<name>\w+)\s[^;]*?\sON (?:public\.|(?P<schema>close_engine)\.)?(?P<table>\w+)"
    r"(?:[^;]*?^BEGIN$.*?^END;$|[^;]*?;$)",
    re.MULTILINE | re.DOTALL,
)
_FUNCTION = re.compile(
    r"^CREATE OR REPLACE FUNCTION close_engine\.(?P<name>\w+)\((?P<header>.*?) AS \$body\$(?P<body>.*?)\$body\$;$",
    re.MULTILINE | re.DOTALL,
)
_REVOKED = re.compile(r"^REVOKE EXECUTE ON FUNCTION(?P<names>.*?)FROM PUBLIC;$", re.MULTILINE | re.DOTALL)


def triggers() -> Iterator[ScriptTrigger]:
    """Yield the triggers that the migrations make on this kind of database."""
    for text in _files(current().dialect.name):
        for found in _TRIGGER.finditer(text):
            yield ScriptTrigger(found["name"], found["schema"], found["table"], found[0].removesuffix(";"))


def functions() -> Iterator[ScriptFunction]:
    """Yield the functions that the migrations make on this kind of database: none on SQLite."""
    for text in _files(current().dialect.name):
        revoked = {name for found in _REVOKED.finditer(text) for name in re.findall(r"\.(\w+)\(", found["names"])}
        for found in _FUNCTION.finditer(text):
            protected = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp" in found["header"]
            yield ScriptFunction(found["name"], found["body"], protected, found["name"] in revoked)


def as_run(text: str, schema: str) -> str:
    """Return SQL of a file as its script runs it: with the CRM's schema, and the CRM's name of its table of leads."""
    there = {"public.": f"{schema}.", '"leads"': identifier(current().tables.leads)}
    return re.sub('public[.]|"leads"', lambda name: there[name[0]], text)


@cache
def _files(kind: str) -> tuple[str, ...]:
    """Return the text of each migration's SQL file for a kind of database, in order."""
    scripts = sorted(directory().glob("[0-9]*.py"))
    return tuple(each.with_name(f"{each.stem}.{kind}.sql").read_text("utf-8") for each in scripts)
