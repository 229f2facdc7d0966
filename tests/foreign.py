"""A writer that knows nothing of this library: plain SQL through the driver, as the CRM or a script sends it.

The fixture `foreign` is such a writer, next to the library, on every database. `foreign_postgres` is for what only
PostgreSQL has.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import peewee
import psycopg2
import pytest

from close_engine.testing import MovableClock

#: The errors that the drivers raise if the guard refuses a write.
REFUSED = (psycopg2.errors.CheckViolation, sqlite3.IntegrityError)

#: What tells the rows of all writers of this process apart.
NUMBERS = itertools.count(1)

COLUMNS = [
    *("id", "lead_id", "rep_id", "entry_point", "stage", "autonomy_level", "questions_asked", "collected_data"),
    *("edit_rounds", "payment_link_url", "payment_link_sent_at", "stalled_at", "completed_at", "closed_lost_at"),
    *("closed_lost_reason", "created_at", "updated_at"),
]


class Change(NamedTuple):
    """What a row of the history says."""

    trigger: str
    source: str | None
    dest: str
    actor: str | None
    reason: str | None = None
    metadata: Any = None
    key: str | None = None


class ForeignWriter:
    """A connection that bypasses the library. On SQLite, `close_engine.` in its SQL becomes `close_engine_`."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.is_postgres = not isinstance(connection, sqlite3.Connection)

    @classmethod
    def beside(cls, database: peewee.Database, url: str) -> ForeignWriter:
        """Open another connection to the same database; a database in memory has only one."""
        if url.startswith("postgresql"):
            connection = psycopg2.connect(url)
            connection.autocommit = True
            return cls(connection)
        if url.endswith(":memory:"):
            return cls(database.connection())
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)
        connection.execute("PRAGMA foreign_keys = on")
        return cls(connection)

    @property
    def actor(self) -> str:
        """The actor that the history records for this writer."""
        return f"database:{self.run('SELECT session_user')[0][0]}" if self.is_postgres else "database"

    def run(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run a statement, and return its rows if it has any."""
        if not self.is_postgres:
            sql = sql.replace("close_engine.", "close_engine_").replace("%s", "?")
        with closing(self.connection.cursor()) as cursor:
            cursor.execute(sql, values)
            return [tuple(row) for row in cursor.fetchall()] if cursor.description else []

    def lead(self) -> str:
        """Insert a lead, and return its id."""
        lead_id = f"lead {next(NUMBERS)}"
        self.run("INSERT INTO leads (id, phone) VALUES (%s, '+15550100')", lead_id)
        return lead_id

    def insert(self, stage: Any, conversation_id: str | None = None, **columns: Any) -> str:
        """Insert a conversation, and return its id."""
        columns = {
            "id": conversation_id or f"conversation {next(NUMBERS)}",
            "lead_id": self.lead(),
            "entry_point": "SMS_REPLY",
            "stage": stage,
            "updated_at": "2026-01-01 00:00:00.000",
            **columns,
        }
        marks = ", ".join(["%s"] * len(columns))
        self.run(f"INSERT INTO close_engine_conversations ({', '.join(columns)}) VALUES ({marks})", *columns.values())
        return str(columns["id"])

    def update(self, conversation_id: str, **columns: Any) -> None:
        """Set these columns and no others."""
        assignments = ", ".join(f"{name} = %s" for name in columns)
        self.run(
            f"UPDATE close_engine_conversations SET {assignments} WHERE id = %s", *columns.values(), conversation_id
        )

    def row(self, conversation_id: str) -> dict[str, Any]:
        """Read a row: column to value, with times as naive datetimes."""
        (values,) = self.run(
            f"SELECT {', '.join(COLUMNS)} FROM close_engine_conversations WHERE id = %s", conversation_id
        )
        row = dict(zip(COLUMNS, values, strict=True))
        return {name: moment(value) if name.endswith("_at") else value for name, value in row.items()}

    def stage(self, conversation_id: str) -> str:
        return str(self.row(conversation_id)["stage"])

    def history(self, conversation_id: str) -> list[Change]:
        """Read the history of a conversation, oldest first."""
        rows = self.run(
            'SELECT "trigger", source, dest, actor, reason, metadata, "key" FROM close_engine.history '
            "WHERE conversation_id = %s ORDER BY id",
            conversation_id,
        )
        return [
            Change(*row)._replace(metadata=json.loads(row[5]) if isinstance(row[5], str) else row[5]) for row in rows
        ]

    def recorded_at(self, conversation_id: str) -> list[datetime]:
        """Read when the changes of a conversation were made, oldest first."""
        rows = self.run(
            "SELECT created_at FROM close_engine.history WHERE conversation_id = %s ORDER BY id", conversation_id
        )
        return [moment(created_at) for (created_at,) in rows]

    def silent_since(self) -> dict[str, datetime]:
        """Read since when each conversation that may stall has been silent."""
        return self.deadlines("stall")

    def deadlines(self, trigger: str) -> dict[str, datetime]:
        """Read the deadlines at which the sweeps fire this trigger, by the id of the conversation or action."""
        rows = self.run('SELECT subject_id, at FROM close_engine.deadlines WHERE "trigger" = %s', trigger)
        return {subject_id: moment(at) for subject_id, at in rows}


def moment(value: Any) -> Any:
    """Convert a stored time to a naive datetime; SQLite stores text."""
    return datetime.fromisoformat(value) if isinstance(value, str) else value


@contextmanager
def guards_off(writer: ForeignWriter, table: str) -> Iterator[None]:
    """Write as if there were no triggers on a table: a row from before the guards needs that."""
    if writer.is_postgres:
        writer.run("SET session_replication_role = replica")
        yield
        writer.run("RESET session_replication_role")
        return
    table = table.replace("close_engine.", "close_engine_")
    made = writer.run("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = %s", table)
    for name, _ in made:
        writer.run(f"DROP TRIGGER {name}")
    yield
    for _, statement in made:
        writer.connection.execute(statement)


def spoil(writer: ForeignWriter, table: str, column: str, value: str | None, row_id: Any) -> None:
    """Put a value into a row as if it had been there before the guards."""
    with guards_off(writer, table):
        writer.run(f"UPDATE {table} SET {column} = %s WHERE id = %s", value, row_id)


@pytest.fixture
def foreign(database: peewee.Database, database_url: str, close_engine_clock: MovableClock) -> Iterator[ForeignWriter]:
    close_engine_clock.let_go()  # what a foreign writer causes is compared with real time
    writer = ForeignWriter.beside(database, database_url)
    yield writer
    writer.connection.close()


@pytest.fixture
def foreign_postgres(postgres: peewee.Database, postgres_url: str) -> Iterator[ForeignWriter]:
    writer = ForeignWriter.beside(postgres, postgres_url)
    yield writer
    writer.connection.close()
