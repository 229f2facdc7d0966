"""SQLite: the library's tables have a prefix; the context is a row that exists only during its write.

>>> SQLITE.own_table("history")
(None, 'close_engine_history')
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee

from close_engine.database.catalog import Catalog, Column, ForeignKey, Trigger
from close_engine.database.dialect import Dialect, Found
from close_engine.database.fields import dump_json
from close_engine.database.provenance import Provenance, Write
from close_engine.errors import GuardMissing, SchemaError

__all__ = ["SQLITE", "Sqlite", "SqliteCatalog", "WalConnection"]

#: How many seconds a connection waits for another one's lock.
_SQLITE_WAITS = 60

#: The longest busy_timeout, in milliseconds.
_LONGEST_WAIT = 2**31 - 1

#: The database's clock. The table is empty outside tests.
_NOW = "coalesce((SELECT at FROM close_engine_clock), strftime('%Y-%m-%d %H:%M:%f', 'now'))"


class SqliteCatalog(Catalog):
    """Reads SQLite's catalog. Only names and nullability must match."""

    exact = False

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        try:
            return super().columns(table, schema)
        except peewee.OperationalError as error:
            if "no such table" in str(error):  # a view, and what it reads is gone
                return {}
            raise

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        return [
            ForeignKey(None, key.column, key.dest_table, key.on_delete, key.on_update)
            for key in self.database.get_foreign_keys(table)
        ]

    def triggers(self, table: str, schema: str | None = None) -> dict[str, Trigger]:
        rows = self.database.execute_sql(
            "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,)
        ).fetchall()
        return {name: Trigger(self.printed_trigger(sql)) for name, sql in rows}


class Sqlite(Dialect):
    """SQLite: a prefix for the library's tables, a row for the context of a write."""

    name = "sqlite"

    #: Take the write lock at once: SQLite may refuse it to a transaction that has already read.
    begin = ("IMMEDIATE",)

    catalog = SqliteCatalog

    guards = (("close_engine_conversations", 14), ("pending_actions", 20))

    row_lock = ""  # SQLite has one writer at a time

    publish = "INSERT INTO {events} (event, stage, conversation_id, fact, facts) VALUES (%s, '', %s, %s, %s)"

    def own_table(self, name: str) -> tuple[str | None, str]:
        return None, f"close_engine_{name}"

    def folded(self, name: str) -> str:
        return name.encode().lower().decode()  # SQLite knows upper and lower case of ASCII only

    def why_no_table(self, name: str) -> str | None:
        ours = self.folded(name).startswith(self.own_table("")[1])
        return "names that begin with close_engine_ are this library's own" if ours else None

    moment = f"(SELECT {_NOW})"

    # Cut to milliseconds, because printf() and strftime() round. Without the offset, CAST would cut towards zero.
    later = (
        f"(SELECT strftime('%Y-%m-%d %H:%M:%f', {_NOW}, printf('%+.3f seconds', "
        "(CAST(round(%s * 1000.0, 3) + 1e12 AS INTEGER) - 1000000000000) / 1000.0)))"
    )

    def unreadable_time(self, column: str) -> str:
        # As the guards say it.
        return (
            f"({column} IS NOT NULL AND NOT (typeof({column}) = 'text' AND julianday({column}) IS NOT NULL "
            f"AND date(substr({column}, 1, 10)) IS substr({column}, 1, 10) "
            f"AND substr({column}, 1, 4) BETWEEN '0001' AND '9998'))"
        )

    def has_more_than_ascii(self, text: str) -> str:
        return f"{text} GLOB '*[^ -~]*'"

    def suspect_json(self, text: str) -> str:
        # char(123) is {, which `sql` would translate.
        outside = f"replace(replace({text}, '[', ''), char(123), '')"
        strange = f"length({text}) > 4000 OR length({text}) - length({outside}) > 100 OR NOT json_valid({text})"
        return f"{text} IS NOT NULL AND ({strange})"

    def set_clock(self, database: peewee.Database, at: str | None) -> None:
        with database.atomic(*self.begin):
            database.execute_sql("DELETE FROM close_engine_clock")
            if at is not None:
                database.execute_sql("INSERT INTO close_engine_clock VALUES (?)", (at,))

    resumes_to = (
        "(SELECT r.stage FROM close_engine_resumes_to r WHERE r.conversation_id = close_engine_conversations.id)"
    )

    def sql(self, text: str) -> str:
        text = text.replace("{resumes_to}", self.resumes_to)
        text = text.replace("{moment}", self.moment).replace("{later}", self.later)
        return text.replace("{", "close_engine_").replace("}", "").replace("%s", "?")

    def run(self, database: peewee.Database, statement: Callable[[], Found]) -> Found:
        with _guard_missing():
            return statement()

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        return self.sql(f'UPDATE "{table}" SET {assignments} WHERE {conditions} RETURNING {returning}')

    def execute_guarded(
        self,
        database: peewee.Database,
        statement: str,
        parameters: Sequence[Any],
        provenance: Provenance,
        write: Write,
    ) -> tuple[Any, ...] | None:
        with database.atomic(*self.begin), _context(database, provenance, write):
            rows = database.execute_sql(statement, parameters).fetchall()
            if not rows:
                return None
            (recorded,) = database.execute_sql("SELECT context FROM close_engine_context WHERE id = 1").fetchone()
            if recorded.startswith("{"):  # it still is the context
                raise GuardMissing("close_engine_conversations")
        return (*rows[0], recorded)

    @contextmanager
    def attributed(self, database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
        count = (
            "SELECT count(*) FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ? AND name GLOB 'close_engine_*'"
        )
        self.require_guards([database.execute_sql(count, (table,)).fetchone()[0] for table, _ in self.guards])
        with _context(database, provenance, write):
            yield

    def for_update(self, database: peewee.Database, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        # Any write takes the write lock, which covers the whole file.
        with _guard_missing():
            database.execute_sql("DELETE FROM close_engine_context")
        return query

    def hold(self, database: peewee.Database, what: str, name: str) -> None:
        """Do nothing: SQLite has one writer at a time."""

    def skip_locked(self, *aliases: str) -> str:
        return self.row_lock

    def in_subquery(self, query: str) -> str:
        return f"IN ({query})"

    def sample(self, table: str, every: int) -> str:
        return self.sql(f"SELECT * FROM {{{table}}} WHERE rowid % {every} = 0")

    def merged_list(self, column: str) -> str:
        return f"close_engine_merge({column}, ?)"

    merged_mapping = merged_list

    def json_text(self, column: str, key: str) -> str:
        # What stood there before the guards may be no JSON.
        return f"CASE WHEN json_valid({column}) THEN json_extract({column}, '$.{key}') END"

    def prepare(self, database: peewee.Database) -> None:
        database.register_function(_merge_json, "close_engine_merge", 2)  # type: ignore[attr-defined]

    @contextmanager
    def limit_wait(self, database: peewee.Database, timeout: timedelta) -> Iterator[None]:
        ((before,),) = database.execute_sql("PRAGMA busy_timeout").fetchall()
        milliseconds = min(max(1, round(timeout.total_seconds() * 1000)), _LONGEST_WAIT)
        database.execute_sql(f"PRAGMA busy_timeout = {milliseconds}")
        try:
            yield
        except peewee.OperationalError as error:
            if str(error) != "database is locked":
                raise
            raise SchemaError(
                f"Nothing was changed: another process has been writing to this SQLite file for "
                f"{timeout.total_seconds():g} seconds. End it, or wait longer with lock_timeout (--lock-timeout)."
            ) from error
        finally:
            database.execute_sql(f"PRAGMA busy_timeout = {before}")

    def lock_migrations(self, database: peewee.Database, timeout: timedelta) -> None:
        """Do nothing: BEGIN IMMEDIATE already locked the file."""


@contextmanager
def _context(database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
    """Keep the context in its table while the block writes."""
    with _guard_missing():
        insert = "INSERT OR REPLACE INTO close_engine_context VALUES (1, ?)"
        database.execute_sql(insert, (provenance.context(write),))
        yield
        database.execute_sql("DELETE FROM close_engine_context")


@contextmanager
def _guard_missing() -> Iterator[None]:
    """Turn what SQLite says if a table of the library is gone into GuardMissing."""
    try:
        yield
    except peewee.OperationalError as error:
        if re.match(r"no such table: (main\.)?close_engine_(?!conversations)", str(error)):
            raise GuardMissing("close_engine_conversations") from error
        raise


def _merge_json(stored: str | None, merged: str) -> str:
    """Merge in Python: SQLite's own json_patch() drops nulls and merges deeply."""
    old, new = json.loads(stored or "null"), json.loads(merged)
    if isinstance(new, dict):
        return dump_json({**(old if isinstance(old, dict) else {}), **new})
    elements = [*(old if isinstance(old, list) else []), *new]
    return dump_json([element for place, element in enumerate(elements) if element not in elements[:place]])


class WalConnection(sqlite3.Connection):
    """A connection in WAL mode, even if many processes open a new file at once.

    SQLite lets one of them change the mode and refuses the others at once, regardless of their timeout. So try again.
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


SQLITE = Sqlite()
