"""PostgreSQL: our tables in a schema of their own, the context in a setting that ends with the transaction.

>>> POSTGRES.own_table("history")
('close_engine', 'history')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee

from close_engine.database.catalog import Catalog, Column, ForeignKey, Index, Trigger
from close_engine.database.dialect import Dialect
from close_engine.database.provenance import Provenance, Write
from close_engine.errors import SchemaError

__all__ = ["POSTGRES", "Postgres", "PostgresCatalog"]

#: As in the first migration, which makes the schema where it is run without this library.
_MADE_HERE = "Made by the migrations of close_engine, and dropped with them."

#: Type in DDL to how PostgreSQL prints it, where that is not the same in lower case.
_PRINTED = {"BIGSERIAL": "bigint", "SERIAL": "integer", "TIMESTAMP(3)": "timestamp(3) without time zone"}

#: The advisory lock that whoever migrates holds.
_MIGRATIONS = "pg_catalog.hashtext('close_engine.migrate'::text)::bigint"

#: The SQLSTATE of a lock that was not given within lock_timeout.
_LOCK_NOT_AVAILABLE = "55P03"

#: The most milliseconds that lock_timeout takes.
_LONGEST_WAIT = 2**31 - 1

_ACTIONS = {"a": "NO ACTION", "c": "CASCADE", "d": "SET DEFAULT", "n": "SET NULL", "r": "RESTRICT"}


class PostgresCatalog(Catalog):
    """PostgreSQL's, read for any role: its information_schema shows a role only what that role owns."""

    exact = True

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        rows = self.database.execute_sql(
            """
            SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
                coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, ''))
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                AND n.nspname = coalesce(%s::name, pg_catalog.current_schema())
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
            WHERE c.relname = %s AND c.relkind IN ('r', 'p') ORDER BY a.attnum
            """,
            (schema, table),
        ).fetchall()
        return {name: Column(type_, required, default) for name, type_, required, default in rows}

    def indexes(self, table: str, schema: str | None = None) -> dict[str, Index]:
        rows = self.database.execute_sql(
            """
            SELECT x.relname, i.indisunique, i.indpred IS NOT NULL, ARRAY(
                SELECT coalesce(a.attname::text, 'an expression')
                FROM pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (number, place)
                LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number ORDER BY k.place
            )
            FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
            JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                AND n.nspname = coalesce(%s::name, pg_catalog.current_schema())
            WHERE c.relname = %s
            """,
            (schema, table),
        ).fetchall()
        return {name: Index(tuple(columns), unique, partial) for name, unique, partial, columns in rows}

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        rows = self.database.execute_sql(
            """
            SELECT k.conname, a.attname, t.relname, k.confdeltype::text, k.confupdtype::text
            FROM pg_catalog.pg_constraint k
            JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            JOIN pg_catalog.pg_class t ON t.oid = k.confrelid
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.conkey[1]
            WHERE c.relname = %s AND k.contype = 'f'
            """,
            (table,),
        ).fetchall()
        return [
            ForeignKey(name, column, target, _ACTIONS[on_delete], _ACTIONS[on_update])
            for name, column, target, on_delete, on_update in rows
        ]

    def triggers(self, table: str) -> dict[str, Trigger]:
        rows = self.database.execute_sql(
            """
            SELECT t.tgname, t.tgenabled IN ('O', 'A'),
                t.tgtype & 1 > 0 AND t.tgtype & 2 > 0 AND t.tgtype & (4 | 16) > 0, -- each row, before, insert or update
                p.prosecdef AND 'search_path=pg_catalog, pg_temp' = ANY (p.proconfig)
            FROM pg_catalog.pg_trigger t
            JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
            WHERE c.relname = %s AND NOT t.tgisinternal ORDER BY t.tgname
            """,
            (table,),
        ).fetchall()
        return {name: Trigger(enabled, rewrites, bool(protected)) for name, enabled, rewrites, protected in rows}

    def printed(self, ddl_type: str, required: bool, default: str | None) -> Column:
        type_ = _PRINTED.get(ddl_type, ddl_type.lower().replace("varchar", "character varying"))
        if default is not None and default.startswith("'"):
            default = f"{default}::{type_}"
        return Column(type_, required, default)


#: Local to the transaction, so that no other client of a connection pool ever meets it.
_SET_CONTEXT = "pg_catalog.set_config('close_engine.context'::text, %s::text, true)"


class Postgres(Dialect):
    """PostgreSQL: our tables in a schema of their own, the context in a setting that ends with the transaction."""

    name = "postgresql"

    # A role that may create in `public` could put a better match for an unqualified call there.
    builtin = "pg_catalog."

    catalog = PostgresCatalog

    # NO KEY: the CRM may go on adding messages and events that refer to a held lead.
    row_lock = "FOR NO KEY UPDATE"

    def own_table(self, name: str) -> tuple[str | None, str]:
        return "close_engine", name

    def sql(self, text: str) -> str:
        return text.replace("{", "close_engine.").replace("}", "")

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        # The provenance is a condition that always holds, so that it travels in the same round trip.
        return self.sql(
            f'UPDATE "{table}" SET {assignments} WHERE {conditions} '
            f"AND {_SET_CONTEXT} IS NOT NULL RETURNING {returning}, "
            "pg_catalog.currval('close_engine.history_id_seq'::pg_catalog.regclass)"
        )

    def execute_guarded(
        self,
        database: peewee.Database,
        statement: str,
        parameters: Sequence[Any],
        provenance: Provenance,
        write: Write,
    ) -> tuple[Any, ...] | None:
        cursor = database.execute_sql(statement, (*parameters, provenance.context(write)))
        row: tuple[Any, ...] | None = cursor.fetchone()
        if row is None and database.in_transaction():
            # If another writer won while this UPDATE waited, the setting is already made: clear it.
            database.execute_sql(f"SELECT {_SET_CONTEXT}", ("",))
        return row

    @contextmanager
    def attributed(self, database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
        database.execute_sql(f"SELECT {_SET_CONTEXT}", (provenance.context(write),))
        yield
        database.execute_sql(f"SELECT {_SET_CONTEXT}", ("",))

    def for_update(self, database: peewee.Database, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        return query.for_update(self.row_lock)  # type: ignore[arg-type]

    def skip_locked(self, *aliases: str) -> str:
        return f"{self.row_lock} OF {', '.join(aliases)} SKIP LOCKED"

    def ids_of(self, query: str) -> str:
        return f"= ANY (ARRAY({query}))"

    def sample(self, table: str, every: int) -> str:
        return self.sql(f"SELECT * FROM {{{table}}} TABLESAMPLE pg_catalog.bernoulli ({100 / every}) REPEATABLE (0)")

    def merged_list(self, column: str) -> str:
        return (
            "(SELECT pg_catalog.jsonb_agg(element ORDER BY place) "
            "FROM (SELECT element, pg_catalog.min(place) AS place FROM pg_catalog.jsonb_array_elements("
            f"CASE pg_catalog.jsonb_typeof({column}) WHEN 'array' THEN {column} ELSE '[]' END || %s::jsonb) "
            "WITH ORDINALITY AS elements (element, place) GROUP BY element) AS merged)"
        )

    def merged_mapping(self, column: str) -> str:
        return f"CASE pg_catalog.jsonb_typeof({column}) WHEN 'object' THEN {column} ELSE '{{}}' END || %s::jsonb"

    def failed(self, database: peewee.Database) -> bool:
        # The driver knows it, without a round trip; 3 is libpq's PQTRANS_INERROR.
        return bool(database.connection().info.transaction_status == 3)

    def lock_migrations(self, database: peewee.Database, timeout: timedelta) -> None:
        ((before,),) = database.execute_sql("SELECT pg_catalog.current_setting('lock_timeout'::text)").fetchall()
        milliseconds = min(max(1, round(timeout.total_seconds() * 1000)), _LONGEST_WAIT)
        try:
            # A savepoint, so that the transaction lives on and can ask who holds the lock.
            with database.atomic():
                _set_lock_timeout(database, f"{milliseconds}ms")
                database.execute_sql(f"SELECT pg_catalog.pg_advisory_xact_lock({_MIGRATIONS})")
                _set_lock_timeout(database, before)
        except peewee.OperationalError as error:
            if getattr(getattr(error, "orig", None), "pgcode", None) != _LOCK_NOT_AVAILABLE:
                raise
            raise SchemaError(_who_migrates(database, timeout)) from error

    def create_schema(self, database: peewee.Database) -> None:
        # IF NOT EXISTS asks for the right to create schemas even where there is nothing to create.
        found = database.execute_sql("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine'")
        if not found.fetchall():
            database.execute_sql("CREATE SCHEMA close_engine")
            database.execute_sql(f"COMMENT ON SCHEMA close_engine IS '{_MADE_HERE}'")

    def drop_schema(self, database: peewee.Database) -> None:
        found = database.execute_sql(
            "SELECT pg_catalog.obj_description(oid, 'pg_namespace'::name) FROM pg_catalog.pg_namespace "
            "WHERE nspname = 'close_engine'"
        )
        if found.fetchall() == [(_MADE_HERE,)]:
            database.execute_sql("DROP SCHEMA close_engine")


def _set_lock_timeout(database: peewee.Database, value: str) -> None:
    database.execute_sql("SELECT pg_catalog.set_config('lock_timeout'::text, %s::text, true)", (value,))


def _who_migrates(database: peewee.Database, timeout: timedelta) -> str:
    """The sentence that says who holds the lock of migrations; what a role may not see is left out."""
    holders = database.execute_sql(
        f"""
        SELECT l.pid, a.usename, pg_catalog.to_char(
            coalesce(a.xact_start, a.backend_start) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'::text)
        FROM pg_catalog.pg_locks l
        JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = pg_catalog.current_database()
        LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
            AND (l.classid::bigint << 32) | l.objid::bigint = {_MIGRATIONS} AND l.pid IS NOT NULL
        ORDER BY l.pid
        """
    ).fetchall()
    waited = f"Nothing was changed: the lock of migrations was not to be had for {timeout.total_seconds():g} seconds."
    if not holders:
        return f"{waited} Nobody that can be seen holds it now: run it again."
    named = " and ".join(
        f"process {pid}{f' of the role {role}' * bool(role)}{f', since {since} UTC' * bool(since)}"
        for pid, role, since in holders
    )
    end = "; ".join(f"SELECT pg_catalog.pg_terminate_backend({pid})" for pid, *_ in holders)
    return (
        f"{waited} It is held by {named}. If that migrates, wait for it: run this again, or with a longer lock_timeout "
        f"(--lock-timeout). If not, end it: {end}."
    )


POSTGRES = Postgres()
