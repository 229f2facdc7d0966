"""What a database says of itself: columns, indexes, foreign keys and triggers, in the same words for each.

A database's dialect makes its catalog, and `verify` compares it with the models:

>>> from close_engine.backend import connect, current
>>> database = connect("sqlite:///:memory:")
>>> _ = database.execute_sql("CREATE TABLE notes (id TEXT NOT NULL PRIMARY KEY, body TEXT DEFAULT 'none')")
>>> current().dialect.catalog(database).columns("notes")["body"]
Column(type='TEXT', required=False, default="'none'")
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import peewee

__all__ = ["Catalog", "Column", "ForeignKey", "Guard", "Helper", "Index", "PostgresCatalog", "SqliteCatalog"]


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        type, default: as the database prints them.
        required: whether NULL is refused.
    """

    type: str
    required: bool
    default: str | None = None

    def __str__(self) -> str:
        return f"{self.type}{' NOT NULL' * self.required}{f' DEFAULT {self.default}' if self.default else ''}"


@dataclass(frozen=True)
class Index:
    """An index; a partial one covers only some rows, and Prisma does not see it."""

    columns: tuple[str, ...]
    unique: bool = False
    partial: bool = False

    def __str__(self) -> str:
        return f"{'partial ' * self.partial}{'unique ' * self.unique}index on ({', '.join(self.columns)})"


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key of one column. SQLite tells no name: it is None there."""

    name: str | None
    column: str
    table: str
    on_delete: str | None
    on_update: str | None

    def __str__(self) -> str:
        return (
            f"{self.name or 'one'} from {self.column} to {self.table} "
            f"(ON DELETE {self.on_delete} ON UPDATE {self.on_update})"
        )


@dataclass(frozen=True)
class Trigger:
    """A trigger.

    Attributes:
        enabled: whether it fires for an ordinary writer.
        rewrites: whether it may change the row that is to be written, and so what another one checked before.
        protected: whether it works whatever rights and settings the writer has.
    """

    enabled: bool = True
    rewrites: bool = False
    protected: bool = True


@dataclass(frozen=True)
class Guard:
    """The triggers that a migration puts on a table."""

    table: str
    migration: str
    triggers: tuple[str, ...]


@dataclass(frozen=True)
class Helper:
    """One of our tables that no model stands for, and the migrations that make and fill it."""

    columns: tuple[str, ...]
    migrations: tuple[str, ...]


class Catalog:
    """How a catalog is read; by Peewee's introspection where that tells enough.

    Attributes:
        exact: whether types, defaults and names of foreign keys are to agree, or names and nullability alone.
        guards: the triggers that there must be.
        helpers: our tables that no model stands for, by name.
    """

    exact: bool
    guards: tuple[Guard, ...]
    helpers: ClassVar[dict[str, Helper]] = {
        "created": Helper(("table_name", "column_name"), ("0001_conversations",)),
        "silence": Helper(("conversation_id", "since"), ("0002_history", "0003_guard")),
        "transitions": Helper(("machine", "trigger", "source", "dest"), ("0002_history", "0005_decisions")),
    }

    def __init__(self, database: peewee.Database) -> None:
        self.database = database

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        """The columns of a table by name; none where there is no such table."""
        return {
            column.name: Column(str(column.full_type), column.primary_key or not column.null, column.default)
            for column in self.database.get_columns(table, schema)
        }

    def indexes(self, table: str, schema: str | None = None) -> dict[str, Index]:
        """The indexes of a table by name."""
        return {
            index.name: Index(tuple(index.columns), index.unique, " WHERE " in (index.sql or "").upper())
            for index in self.database.get_indexes(table, schema)
        }

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        """The foreign keys of a table that Prisma sees."""
        raise NotImplementedError

    def triggers(self, table: str) -> dict[str, Trigger]:
        """The triggers of a table that Prisma sees, by name, in the order in which they fire."""
        raise NotImplementedError

    def expected(self, field: Any) -> Column:
        """The column that a model's field is to be stored in, as this database would print it."""
        defaults = [constraint.sql for constraint in field.constraints or () if constraint.sql.startswith("DEFAULT ")]
        default = defaults[0].removeprefix("DEFAULT ") if defaults else None
        return self.printed(field.ddl_datatype(self.database.get_sql_context()).sql, not field.null, default)

    def printed(self, ddl_type: str, required: bool, default: str | None) -> Column:
        """A column as this database prints it, from what DDL says."""
        return Column(ddl_type, required, default)


#: Type in DDL to how PostgreSQL prints it, where that is not the same in lower case.
_PRINTED = {"BIGSERIAL": "bigint", "SERIAL": "integer", "TIMESTAMP(3)": "timestamp(3) without time zone"}

_ACTIONS = {"a": "NO ACTION", "c": "CASCADE", "d": "SET DEFAULT", "n": "SET NULL", "r": "RESTRICT"}


class PostgresCatalog(Catalog):
    """PostgreSQL's, read for any role: its information_schema shows a role only what that role owns."""

    exact = True
    guards = (
        Guard(
            "close_engine_conversations",
            "0003_guard",
            (
                "aa_close_engine_opening",
                "zz_close_engine_deletion",
                "zz_close_engine_guard",
                "zz_close_engine_truncation",
            ),
        ),
        Guard("close_engine_conversations", "0005_decisions", ("zz_close_engine_closing", "zz_close_engine_gone")),
        Guard("pending_actions", "0005_decisions", ("zz_close_engine_guard", "zz_close_engine_decision")),
    )

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        rows = self.database.execute_sql(
            """
            SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                coalesce(pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, ''))
            FROM pg_class c
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = coalesce(%s, current_schema())
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
            WHERE c.relname = %s AND c.relkind IN ('r', 'p') ORDER BY a.attnum
            """,
            (schema, table),
        ).fetchall()
        return {name: Column(type_, required, default) for name, type_, required, default in rows}

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        rows = self.database.execute_sql(
            """
            SELECT k.conname, a.attname, t.relname, k.confdeltype::text, k.confupdtype::text
            FROM pg_constraint k
            JOIN pg_class c ON c.oid = k.conrelid
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = current_schema()
            JOIN pg_class t ON t.oid = k.confrelid
            JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.conkey[1]
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
            FROM pg_trigger t
            JOIN pg_class c ON c.oid = t.tgrelid
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = current_schema()
            JOIN pg_proc p ON p.oid = t.tgfoid
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


class SqliteCatalog(Catalog):
    """SQLite's: there the names and the nullability are enough."""

    exact = False
    helpers: ClassVar[dict[str, Helper]] = {
        **Catalog.helpers,
        "context": Helper(("id", "context"), ("0002_history",)),
    }
    guards = (
        Guard(
            "close_engine_conversations",
            "0003_guard",
            (
                "close_engine_deletion",
                "close_engine_guard_id",
                "close_engine_guard_insert",
                "close_engine_guard_update",
                "close_engine_opening",
                "close_engine_record",
                "close_engine_version",
            ),
        ),
        Guard(
            "close_engine_conversations",
            "0005_decisions",
            ("close_engine_closing", "close_engine_gone", "close_engine_unasked"),
        ),
        Guard(
            "pending_actions",
            "0005_decisions",
            (
                "close_engine_action_approved",
                "close_engine_action_closed",
                "close_engine_action_expired",
                "close_engine_action_insert",
                "close_engine_action_update",
                "close_engine_action_withdrawn",
            ),
        ),
    )

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        return [
            ForeignKey(None, key.column, key.dest_table, key.on_delete, key.on_update)
            for key in self.database.get_foreign_keys(table)
        ]

    def triggers(self, table: str) -> dict[str, Trigger]:
        rows = self.database.execute_sql(
            "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,)
        ).fetchall()
        return {name: Trigger() for (name,) in rows}
